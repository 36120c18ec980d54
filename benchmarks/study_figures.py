"""The study's numbers: paired differences between arms, with intervals, from a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.study_arms import ARMS

Run = dict[str, Any]
RESAMPLES = 10_000
WINDOW = 5
"""Steps over which the share of right rollouts is averaged, when arms are compared at equal sampled tokens."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of an arm to its base: mean over seeds, and the bootstrap's 95% interval."""

    mean: float
    low: float
    high: float
    each: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


class Figures:
    """Args:
    report: what `benchmarks.study` writes.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.runs: dict[tuple[str, str], dict[int, Run]] = {}
        for run in report["trials"]:
            self.runs.setdefault((run["world"], run["arm"]), {})[run["seed"]] = run

    def arms(self, world: str) -> list[str]:
        """In the order of `study_arms`."""
        return [arm for arm in ARMS if (world, arm) in self.runs]

    def mean(self, world: str, arm: str, measure: Callable[[Run], float]) -> float:
        return float(np.mean([measure(run) for run in self.runs[world, arm].values()]))

    def difference(self, world: str, arm: str, measure: Callable[[Run], float], base: str = "") -> Difference:
        """To another arm, by default the base of this one, over the seeds that both have."""
        ours, theirs = self.runs[world, arm], self.runs[world, base or ARMS[arm].base]
        return bootstrap([measure(ours[seed]) - measure(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])

    def at_equal_tokens(self, world: str, arm: str, base: str = "") -> Difference:
        """Share of right rollouts in the last window of the one that samples fewer tokens, and in the other's window
        that is centred at the same number of them."""
        ours, theirs = self.runs[world, arm], self.runs[world, base or ARMS[arm].base]
        differences: list[float] = []
        for seed in sorted(ours.keys() & theirs.keys()):
            tokens = min(smoothed(run)[0][-1] for run in (ours[seed], theirs[seed]))
            differences.append(correct_at(ours[seed], tokens) - correct_at(theirs[seed], tokens))
        return bootstrap(differences)

    def leak(self, world: str, arm: str) -> Difference:
        """What became of the right rule's probability on topics that were never trained on."""
        name = "recall/untrained" if world == "tacit" else "rule/untrained"
        before = self.report["before"]
        return bootstrap(
            [
                run["probabilities"][name] - before[f"{world}/{seed}"][name]
                for seed, run in self.runs[world, arm].items()
            ]
        )


def score(name: str, data: str = "heldout") -> Callable[[Run], float]:
    """Of the evaluation after the last step: pass_at_1, avg_at_k or pass_at_k."""
    return lambda run: run["evaluations"][max(run["evaluations"], key=int)][f"eval/{data}/{name}"]


def probability(name: str) -> Callable[[Run], float]:
    return lambda run: run["probabilities"][name]


def known(world: str) -> Callable[[Run], float]:
    """How well the trained topics are known, without sampling noise."""
    return probability("solution/trained" if world == "tacit" else "rule/trained")


def smoothed(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Sampled tokens until the middle of each window of steps, and the share of right rollouts in it. Every step has
    prompts of its own, so these are as fresh as held-out ones."""
    weights = np.ones(WINDOW) / WINDOW
    tokens = np.cumsum(run["sampled_tokens"])
    return np.convolve(tokens, weights, "valid"), np.convolve(run["correct"], weights, "valid")


def correct_at(run: Run, tokens: float) -> float:
    """Interpolated between windows; the last window's, beyond them."""
    return float(np.interp(tokens, *smoothed(run)))


def bootstrap(differences: Sequence[float]) -> Difference:
    """Percentiles of the means of resampled pairs; the same figures give the same interval."""
    values = np.asarray(differences)
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])
    return Difference(float(values.mean()), float(low), float(high), tuple(map(float, values)))
