"""Episodes on disk, one JSON line each: what was sampled can be read, and trained on without an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

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
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
            if number < len(lines):  # a whole line, ended by a newline
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            break
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            raise InputError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.

    Raises:
        InputError: a line is not JSON, or of no step.
    """
    lines = read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        if type(line.get("step")) is not int:
            raise InputError(
                f"{path}, line {number}: no step, but {line.get('step')!r:.40}; a run writes no such line: put back a "
                "whole file"
            )
    return lines


def dump_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    """One episode per line; `load_episodes` reads them back. The file appears whole or not at all.

    Raises:
        OutputError: the disk does not take it.
    """
    partial = path.with_suffix(".partial")
    lines = (json.dumps(dataclasses.asdict(e), ensure_ascii=False) + "\n" for e in episodes)
    with writing(path):
        # errors: half a surrogate pair, which a reward function of the user's may put into a reason, is no text
        partial.write_text("".join(lines), encoding="utf-8", errors="replace")
        partial.rename(path)


def load_episodes(path: Path, vocabulary: int = 2**31) -> list[Episode]:
    """The episodes that `dump_episodes` wrote.

    Args:
        vocabulary: ids are below it.

    Raises:
        InputError: the file is missing, or a line of it is not an episode: cut off, altered, or of something else, such
            as another tokenizer's.
    """
    if not path.is_file():
        raise InputError(f"{path}: no rollouts were dumped for this step; lower run.steps or check run.rollouts")
    return [
        _episode(line, f"{path}, line {number}", vocabulary)
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]


def _episode(line: bytes, where: str, vocabulary: int) -> Episode:
    try:
        episode = _EPISODE.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{where}: not an episode as dumped ({place + ': ' if place else ''}{first['msg']})"
        ) from error
    if told := _inconsistency(episode, vocabulary):
        raise InputError(f"{where}: not an episode as dumped ({told})")
    return episode


def _inconsistency(episode: Episode, vocabulary: int) -> str:
    """Where parts of an episode do not fit together; empty when they do."""
    count = len(episode.trajectories)
    named = {f"trajectories.{i}": trajectory for i, trajectory in enumerate(episode.trajectories)}
    for i, x in enumerate(episode.experiences):
        if not (0 <= x.wrong < count and 0 <= x.right < count):
            return f"experiences.{i}: of trajectories {x.wrong} and {x.right}, and there are {count}"
        named[f"experiences.{i}.reflection"] = x.reflection
        if x.replay is not None:
            named[f"experiences.{i}.replay"] = x.replay
    for name, t in named.items():
        if len(t.logprobs) != len(t.output_ids):
            return f"{name}: {len(t.logprobs)} log-probs for {len(t.output_ids)} tokens"
        if not t.versions:
            return f"{name}: no version of the weights"
        if odd := [id for id in (*t.prompt_ids, *t.output_ids) if not 0 <= id < vocabulary]:
            return f"{name}: token id {odd[0]}, and there are {vocabulary}"
    return ""


for _kind in (Prompt, Trajectory, MetaExperience, Experience, Episode):
    # Strict: text is not taken for a number. And a key with a typing error is not taken for one that is left out.
    with_config(ConfigDict(strict=True, extra="forbid"))(_kind)
_EPISODE = TypeAdapter(Episode)
