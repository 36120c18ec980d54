"""What a run came to: its metrics, read once, and the scores before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mel_fast.dumps import read_metrics
from mel_fast.errors import InputError

SCORES = ("pass_at_1", "avg_at_k", "pass_at_k")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    sets: list[str]
    evaluations: dict[int, dict[str, tuple[float, float, float]]]  # step -> set -> Pass@1, Avg@k, Pass@k
    steps: list[dict[str, float]]  # metrics of each finished step
    lines: list[dict[str, float]]  # everything in metrics.jsonl

    def rows(self) -> list[list[str]]:
        """A row per data set: first and last evaluation, as a table shows them."""
        first, last = min(self.evaluations), max(self.evaluations)
        rows: list[list[str]] = []
        for name in self.sets:
            pairs = zip(*(self.evaluations[step].get(name, [None] * 3) for step in (first, last)), strict=True)
            rows.append([name, *(f"{_share(before)} -> {_share(after)}" for before, after in pairs)])
        return rows


def summarise(run: Path) -> Summary:
    """Reads a run's metrics; those of a run that goes on are read up to the last whole line.

    Raises:
        InputError: the folder holds no metrics, or a line of them is not one of a step or an evaluation.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run}: not a run directory (it has no metrics.jsonl)")
    lines = read_metrics(path)
    evaluations: dict[int, dict[str, tuple[float, float, float]]] = {}
    steps: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        if told := _unusable(line):
            raise InputError(f"{path}, line {number}: {told}; a run writes no such line: put back a whole file")
        heads = [key.removesuffix("/pass_at_1") for key in line if key.endswith("/pass_at_1")]
        names = [head.removeprefix("eval/") for head in heads]  # a name may have slashes of its own
        if names:
            evaluations[line["step"]] = {
                name: (
                    line[f"eval/{name}/{SCORES[0]}"],
                    line[f"eval/{name}/{SCORES[1]}"],
                    line[f"eval/{name}/{SCORES[2]}"],
                )
                for name in names
            }
        else:
            steps.append(line)
    sets = list(dict.fromkeys(name for scores in evaluations.values() for name in scores))
    return Summary(sets, evaluations, steps, lines)


def _unusable(line: dict[str, Any]) -> str:
    """What is wrong with a line of metrics; empty when nothing is."""
    for head in (key.removesuffix(SCORES[0]) for key in line if key.endswith(f"/{SCORES[0]}")):
        for key in (head + score for score in SCORES):
            if not head.startswith("eval/") or not isinstance(line.get(key), int | float):
                return f"{key!r:.80} is no score, but {line.get(key)!r:.40}"
    return ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
