"""Prints docs/CONFIG.md out of the configuration's models: python docs/config_reference.py > docs/CONFIG.md"""

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mel_fast.config import Config

HEAD = """\
# Settings

Every key of a configuration, its type, its default and what it does. Generated from the models that check it:
`python docs/config_reference.py > docs/CONFIG.md`.

A configuration is a YAML file with these sections (`--config FILE`; without it `configs/tiny.yaml`, whose values
differ from the defaults below), and dotted overrides on top: `--optim.lr=1e-5`. A file may name a `base`, a path
relative to itself, whose values it overrides. A list of sections is written as YAML:
`--data.train='[{path: my.jsonl}]'`. An unknown key is an error that names the nearest right one; `--dry-run` prints
what a configuration comes to.
"""
COMPARED = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
LONGEST = 40  # characters of a default that fit into a table


def nested(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None` or `tuple[Model, ...]`."""
    found = [part for part in (annotation, *get_args(annotation)) if inspect.isclass(part)]
    return next((part for part in found if issubclass(part, BaseModel)), None)


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every model that has settings of its own, under its dotted name; `[]` follows the name of a list."""
    for name, field in model.model_fields.items():
        if inner := nested(field.annotation):
            key = f"{prefix}{name}" + ("[]" if get_origin(field.annotation) is tuple else "")
            yield key, inner
            yield from sections(inner, f"{key}.")


def spelt(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        parts = [part for part in arguments if part is not NoneType]
        return " or ".join([*map(spelt, parts), *(["null"] if NoneType in arguments else [])])
    if origin is tuple:
        words = [spelt(part) for part in arguments if part is not Ellipsis]
        return f"list of {words[0]}" if Ellipsis in arguments else "[" + ", ".join(words) + "]"
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", NoneType: "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def typed(field: FieldInfo) -> str:
    """The type, with its limits: `number > 0 or null`."""
    found = [f"{sign} {getattr(one, name):g}" for one in field.metadata for name, sign in COMPARED.items()
             if getattr(one, name, None) is not None]  # fmt: skip
    kind, null, _ = spelt(field.annotation).partition(" or null")
    return f"{kind} {' and '.join(found)}".strip() + null


def default(field: FieldInfo) -> str:
    """As YAML has it; empty where there is none."""
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is PydanticUndefined else json.dumps(value, ensure_ascii=False)


def strings_below(model: type[BaseModel]) -> dict[str, str]:
    """Fields described by a string below them rather than by `Field(description=...)`."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    found: dict[str, str] = {}
    for above, below in itertools.pairwise(ast.iter_child_nodes(definition)):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                found[name] = " ".join(said.split())
    return found


def section(name: str, model: type[BaseModel]) -> str:
    rows, texts, below = [], [], strings_below(model)
    for key, field in model.model_fields.items():
        if nested(field.annotation):
            continue
        value, said = default(field), field.description or below.get(key, "")
        if len(value) > LONGEST:
            texts.append(f"Default of `{name}.{key}`:\n\n{textwrap.indent(json.loads(value), '    ')}\n")
            shown = "below"
        else:
            shown = f"`{value}`" if value else "needed"
        cells = (f"`{name}.{key}`", typed(field), shown, said)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    documented = inspect.cleandoc(vars(model).get("__doc__") or "")
    table = ["| key | type | default | what it does |", "|---|---|---|---|", *rows]
    return "\n\n".join(filter(None, [f"## {name}", documented, "\n".join(table) if rows else "", *texts]))


def main() -> None:
    parts, first = [HEAD], {}
    for name, model in sections(Config):
        same = first.setdefault(model, name)
        parts.append(section(name, model) if same == name else f"## {name}\n\nAs `{same}`.")
    print("\n\n".join(part.strip() for part in parts))


if __name__ == "__main__":
    main()
