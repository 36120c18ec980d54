"""Runs -> report.html: curves, the experience viewer and the rollout viewer in one file."""

from __future__ import annotations

import re
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mel_fast.dumps import load_episodes
from mel_fast.errors import InputError
from mel_fast.files import write_whole
from mel_fast.report import experiences as experience_lists
from mel_fast.report import rollouts as rollout_lists
from mel_fast.report.curves import figures, table
from mel_fast.report.experiences import PER_CHUNK, Experiences
from mel_fast.report.page import page
from mel_fast.report.rollouts import Rollouts
from mel_fast.report.runs import Run, differences, dotted, group_seeds, labels, open_run
from mel_fast.report.thin import Limits, evenly
from mel_fast.report.tokens import Vocabulary

NAME = "report.html"


def write_report(*folders: Path, out: Path | None = None, limits: Limits | None = None) -> Path:
    """Writes the report of one or several runs, finished or not, and returns its path.

    Args:
        folders: run directories.
        out: the file to write; by default report.html in the run's directory or, for several runs, in the current one.
        limits: how much of the dumps is embedded.

    Raises:
        InputError: a folder is not a run's, or holds nothing yet; a file in it cannot be read.
        OutputError: the disk does not take the report; the one before is still there.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run is named twice; name each once")
    runs = [open_run(folder.resolve()) for folder in folders]
    path = out or (runs[0].path / NAME if len(runs) == 1 else Path(NAME))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    write_whole(path, page(title, payload(runs, limits or Limits())))  # a browser may be reading the one before
    return path


def payload(runs: Sequence[Run], limits: Limits) -> dict[str, Any]:
    """Everything the page shows, by the name under which it is embedded."""
    parts = [_dumped(index, run, limits.share(len(runs))) for index, run in enumerate(runs)]
    experiences = [record for part in parts for record in part.experiences]
    groups = [record for part in parts for record in part.groups]
    data: dict[str, Any] = {"overview": overview(runs)}
    data["experiences"] = experience_lists.columns(experiences) | {
        "per_chunk": PER_CHUNK,
        "notes": [part.notes[0] for part in parts],
    }
    data["rollouts"] = rollout_lists.columns(groups) | {
        "vocabularies": [part.vocabulary for part in parts],
        "notes": [part.notes[1] for part in parts],
    }
    for i in range(0, len(experiences), PER_CHUNK):
        data[f"experiences-{i // PER_CHUNK}"] = experiences[i : i + PER_CHUNK]
    for group, chunk in zip(groups, rollout_lists.chunks(groups), strict=True):
        data.setdefault(f"rollouts-{chunk}", []).append(group)
    return data


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """Curves, scores and settings."""
    groups = group_seeds(runs)
    tables = [table(run.summary.lines) for run in runs]
    samples = {run.whole("eval.samples") for run in runs}
    k = samples.pop() if len(samples) == 1 else None
    return {
        "runs": [
            {
                "name": run.name,
                "steps_done": max((int(line["step"]) for line in run.summary.steps), default=0),
                "steps": run.whole("run.steps"),
                "seed": run.whole("run.seed"),
                "settings": dotted(run.config),
                "sets": run.summary.sets,
                "table": columns,
            }
            for run, columns in zip(runs, tables, strict=True)
        ],
        "groups": [
            {"label": label, "runs": members, "differs": differs}
            for label, members, differs in zip(labels(runs, groups), groups, differences(runs, groups), strict=True)
        ],
        "figures": figures(dict.fromkeys(name for columns in tables for name in columns["columns"]), k),
        "k": k,
    }


@dataclass(frozen=True, slots=True)
class _Dumped:
    """What the dumps of one run give."""

    experiences: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    vocabulary: dict[str, Any]
    notes: tuple[str, str]  # what is embedded of each


def _dumped(index: int, run: Run, limits: Limits) -> _Dumped:
    """Reads the dumps of a run once, for both viewers. They may be large: only as many are read as `dump_bytes` allows,
    and none without experiences whose rollouts are not shown."""
    files = {
        int(match[1]): path
        for path in (run.path / "rollouts").glob("step_*.jsonl")
        if (match := re.fullmatch(r"step_(\d+)\.jsonl", path.name))
    }
    count, steps = len(files), sorted(files)
    while count > 1 and sum(files[step].stat().st_size for step in steps) > limits.dump_bytes:
        count = count * 3 // 4
        steps = evenly(sorted(files), count)
    shown = set(evenly(steps, limits.rollout_steps))
    empty = {int(line["step"]) for line in run.summary.steps if line.get("mel/pairs") == 0}
    vocabulary = Vocabulary(run)
    found, rolled = Experiences(index, vocabulary, limits), Rollouts(index, run, vocabulary, limits)
    for step in steps:
        if step in shown or step not in empty:
            episodes = load_episodes(files[step])
            found.add(step, episodes)
            if step in shown:
                rolled.add(step, episodes)
    experiences, groups = found.records(), rolled.records()
    whole = len(steps) == len(files)
    gaps = "" if whole else f" {_part(steps, len(files))} dumped steps were read: all are too large."
    of_experiences = f"{run.name}: {_part(experiences, found.seen)} meta-experiences.{gaps}"
    of_groups = f"{run.name}: {_part(groups, rolled.seen)} groups, from {_part(shown, len(files))} dumped steps."
    notes = (of_experiences, " ".join(filter(None, (of_groups, rolled.note))))
    return _Dumped(experiences, groups, vocabulary.table(), notes)


def _part(some: Sized, all_: int) -> str:
    return f"{len(some):,} of {all_:,}"
