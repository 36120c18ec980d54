"""Episodes on disk, one JSON line each: what was sampled can be read, and trained on without an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mel_fast.errors import InputError
from mel_fast.files import writing
from mel_fast.types import Episode, Experience, MetaExperience, Prompt, Trajectory


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last line torn by a crash is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")  # bytes: a line may be torn within a character
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8")) if line.strip() else None
        except ValueError as error:
            if number < len(lines):  # a whole line, ended by a newline
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            break
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            raise InputError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
    return rows


def dump_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """One episode per line; `load_episodes` reads them back. The file appears whole or not at all.

    Raises:
        OutputError: the disk does not take it.
    """
    partial = path.with_suffix(".partial")
    lines = (json.dumps(dataclasses.asdict(e), ensure_ascii=False) + "\n" for e in episodes)
    with writing(path):
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(path)


def load_episodes(path: Path) -> list[Episode]:
    """Raises InputError, naming the file, when it is missing or was not written by `dump_episodes`."""
    if not path.is_file():
        raise InputError(f"{path}: no rollouts were dumped for this step; lower run.steps or check run.rollouts")
    try:
        return [_episode(row) for row in read_jsonl(path)]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a dump of rollouts ({type(error).__name__}: {error})") from error


def _episode(row: dict[str, Any]) -> Episode:
    messages = row["prompt"].pop("messages")
    prompt = Prompt(**row["prompt"], messages=None if messages is None else tuple(messages))
    experiences = [
        Experience(
            **{key: x[key] for key in ("wrong", "right", "malformed", "kept")},
            reflection=_trajectory(x["reflection"]),
            meta=None if x["meta"] is None else MetaExperience(**x["meta"]),
            replay=None if x["replay"] is None else _trajectory(x["replay"]),
        )
        for x in row["experiences"]
    ]
    return Episode(row["step"], prompt, [_trajectory(t) for t in row["trajectories"]], experiences, row["dropped"])


def _trajectory(row: dict[str, Any]) -> Trajectory:
    versions = [(version, tokens) for version, tokens in row.pop("versions")]  # JSON knows no tuples
    return Trajectory(**row, versions=versions)
