r"""Which columns of a data set hold the question and the answer, and how their values become text.

`SCHEMAS` is the table of the published layouts; a `Fields` mapping overrides any part of it. A path with dots reaches
into nested columns: `reward_model.ground_truth`.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mel_fast.errors import InputError


class DataError(InputError):
    """Data that cannot be used: says where, what is wrong, and what to do."""


class Fields(BaseModel):
    """Column paths that replace the recognised ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str | None = Field(
        default=None, description="text or a list of chat messages; dots lead into nested columns"
    )
    answer: str | None = Field(default=None, description="the gold answer")
    id: str | None = Field(default=None, description="without one a hash of the question serves")
    source: str | None = Field(default=None, description="the family of a problem, as the report calls it")


@dataclass(frozen=True, slots=True)
class Schema:
    question: str  # text, or a list of chat messages
    answer: str
    ids: tuple[str, ...] = ("id",)  # the first with a value counts; without any, the question's hash does
    source: str = "data_source"


# The first whose question and answer are there is taken.
SCHEMAS = (
    Schema("prompt", "reward_model.ground_truth", ("extra_info.index",)),  # verl, DAPO-Math-17k, DAPO's AIME-2024
    Schema("question", "final_answer"),  # Hothan/OlympiadBench, math-ai/olympiadbench: lists of answers
    Schema("Problem", "Answer", ("ID",)),  # Maxwell-Jia/AIME_2024
    Schema("question", "answer"),  # plain files, math-ai/amc23, opencompass/AIME2025, openai/gsm8k
    Schema(
        "problem", "answer", ("unique_id", "id", "problem_idx")
    ),  # MATH-500, H4/aime_2024, math-ai/aime25, MathArena
    Schema("problem", "solution"),  # math-ai/aime24, MATH: the answer is in the solution's box
    Schema("prompt", "solution"),  # DAPO-Math-17k-Processed without its verl columns
    Schema("prompt", "answer"),
)

_MISSING = object()
_BOX = re.compile(r"\\boxed\s*\{")
_UNESCAPED_DOLLAR = re.compile(r"(?<!\\)\$")
_GSM8K = re.compile(r"####\s*(\S.*?)\s*\Z")


def recognise(columns: Iterable[str], fields: Fields, where: str) -> Schema:
    """The layout of a data set with these column paths (nested ones dotted)."""
    there = set(columns)
    for known in SCHEMAS:
        question = fields.question or (known.question if known.question in there else None)
        answer = fields.answer or (known.answer if known.answer in there else None)
        if question and answer:
            return Schema(question, answer, (fields.id,) if fields.id else known.ids, fields.source or known.source)
    unknown = [f"fields.{key}" for key in ("question", "answer") if getattr(fields, key) is None]
    raise DataError(
        f"{where}: cannot tell question and answer from the columns ({_listed(there)}); set {' and '.join(unknown)}"
    )


def lookup(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or the marker for nothing; see `required`."""
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _MISSING
        value = value[key]
    return value


def required(row: Mapping[str, Any], path: str, key: str, where: str) -> Any:
    value = lookup(row, path)
    if value is _MISSING:
        paths = column_paths(row)
        near = difflib.get_close_matches(path, paths, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"{where}: no field {path!r}{meant}; the fields are {_listed(paths)}; set fields.{key}")
    return value


def optional(row: Mapping[str, Any], path: str) -> str:
    value = lookup(row, path)
    return "" if value is _MISSING or value is None else str(value).encode(errors="replace").decode().strip()


def column_paths(row: Mapping[str, Any]) -> list[str]:
    """Names of the columns and, dotted, of what is nested in them."""
    paths: list[str] = []
    for key, value in row.items():
        paths.append(key)
        if isinstance(value, Mapping):
            paths += [f"{key}.{inner}" for inner in column_paths(value)]
    return paths


def question_of(value: Any, where: str) -> tuple[str, tuple[dict[str, str], ...] | None]:
    """The question's text, and the chat messages where the data have them."""
    messages = None
    if isinstance(value, list):
        if not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        ):
            raise DataError(f'{where}: the question is a list, so each entry must be {{"role": text, "content": text}}')
        messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in value)
        value = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: the question is empty; remove the row or fill it in")
    if not isinstance(value, str):
        raise DataError(f"{where}: the question must be text or chat messages, not {type(value).__name__}")
    for text in (value, *(text for message in messages or () for text in message.values())):
        _check_characters(text, "question", where)
    return value.strip(), messages


def answer_of(value: Any, path: str, where: str) -> str:
    """The gold answer as text. Text is taken as it stands, but for three layouts: a list of LaTeX answers, a worked
    solution (the column's name says so) with a box, and GSM8K's solution that ends in "#### 18"."""
    if isinstance(value, list):  # Math-Verify compares "a, b" as a set
        if any(isinstance(item, list) for item in value):
            raise DataError(f"{where}: the answer is a list of lists; it must be text, a number, or a list of those")
        return ", ".join(_UNESCAPED_DOLLAR.sub("", answer_of(item, path, where)) for item in value) or answer_of(
            None, path, where
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: the answer is empty; remove the row or fill it in")
    if not isinstance(value, str):
        told = reprlib.repr(value)
        raise DataError(f"{where}: the answer must be text or a number, not {type(value).__name__} ({told})")
    _check_characters(value, "answer", where)
    if path.rsplit(".", 1)[-1] == "solution":
        boxed = _last_box(value)
        if boxed is None and "\n" in value.strip():
            raise DataError(f"{where}: the solution has no \\boxed{{}} that shows its answer; set fields.answer")
        return (boxed or value).strip()
    match = _GSM8K.search(value)
    return match[1] if match else value.strip()


def _check_characters(text: str, what: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name them: "\\ud800"
        raise DataError(
            f"{where}: the {what} has half a surrogate pair at character {error.start}, which is no text; repair it"
        ) from error


def _last_box(text: str) -> str | None:
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end]
    return None


def _listed(names: Iterable[str]) -> str:
    # An error is one line, whatever a column is called.
    return ", ".join(sorted(name if name.isprintable() else repr(name) for name in names)) or "none"
