"""Rows out of jsonl, json and parquet files and out of Hugging Face data sets, each with the words for where it stood.

Files are read here and not by `datasets`, so that an error can name the file and the line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from mel_fast.schemas import DataError, Fields

Row = tuple[str, dict[str, Any]]  # where, values
_BATCH = 1000


class Source(BaseModel):
    """One data set: a file, or a name (or folder) that `datasets.load_dataset` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(description="a .jsonl, .json or .parquet file, or what `datasets.load_dataset` takes")
    split: str | None = Field(default=None, description="`datasets`: which split; needed when there are several")
    subset: str | None = Field(default=None, description="`datasets`: the configuration's name")
    fields: Fields = Fields()
    name: str | None = Field(
        default=None, description="what evaluation calls it; default: the data's own word, or the path's"
    )
    limit: int | None = Field(default=None, ge=1, description="take this many prompts, from the start")


def read_rows(source: Source) -> Iterator[Row]:
    path = Path(source.path).expanduser()
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix in readers:
        if source.split or source.subset:
            raise DataError(
                f"{path}: split and subset are for data sets of `datasets`; a file has neither: remove them"
            )
        if not is_file(path):
            near = difflib.get_close_matches(path.name, _siblings(path), n=1)
            raise DataError(
                f"{path}: there is no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else "")
            )
        return _told(readers[path.suffix](path), path)
    if is_file(path):
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}; use .jsonl, .json or .parquet"
        )
    return _read_hub(source)


def is_file(path: Path) -> bool:
    """False also for what cannot be a name: too long, say."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _told(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """The rows, and what the system or the parquet library says against reading them."""
    where = str(path)
    try:
        for where, row in rows:  # the last place that was read, for the message
            yield where, row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        after = "" if where == str(path) else f" after {where}"
        raise DataError(f"{path}: cannot be read{after}: {' '.join(str(error).split())}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decoded(line, where).strip()
            if text:
                yield where, _object(_json(text, where, "each line must be one JSON object"), where)


def _read_json(path: Path) -> Iterator[Row]:
    rows = _json(
        _decoded(path.read_bytes(), str(path)), str(path), "it must be one list of objects; one per line is .jsonl"
    )
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of objects is needed, not {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield f"{path}[{number}]", _object(row, f"{path}[{number}]")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error
    with file:
        yield from _numbered(file.iter_batches(_BATCH), str(path))


def _read_hub(source: Source) -> Iterator[Row]:
    import datasets

    what = source.path + (f" ({source.subset})" if source.subset else "")
    try:
        data: Any = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (OSError, ValueError) as error:  # not found, no network, no such subset, no such split
        hint = "is it a file? Then its name must end in .jsonl, .json or .parquet. Else check path, subset and split"
        raise DataError(f"{what}: cannot load it: {type(error).__name__}: {error}; {hint}") from error
    if source.split is None:
        if len(data) > 1:
            raise DataError(f"{what}: it has the splits {', '.join(sorted(data))}; set split to one of them")
        data = next(iter(data.values()))
    yield from _numbered(data.with_format("arrow").iter(_BATCH), f"{what} [{data.split}]")


def _numbered(batches: Any, where: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{where} row {number}", row
            number += 1


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no reason to fail
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}); convert the file") from error


def _json(text: str, where: str, need: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text else ""
        raise DataError(f"{where}: not valid JSON ({place}column {error.colno}: {error.msg}); {need}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not usable JSON (brackets nested too deep); {need}") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: not usable JSON ({error}); write such a number as text") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object with question and answer is needed, not {type(value).__name__}")
    return value


def _siblings(path: Path) -> list[str]:
    return [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
