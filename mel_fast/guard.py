"""What guards an update against broken numbers: which samples they come from, and how long a run may go on.

The gradient of a parameter is a sum over all samples of all ranks: a single NaN spoils all of it. The gradient at the
embedding's output is no sum: each position of each sequence has its own. Its norm per sample, the sample's pull, tells
whose numbers are not finite, and who pulls hardest when the loss leaps.

T packed tokens, B sequences, S samples of an optimizer step.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from mel_fast.errors import InputError
from mel_fast.files import write_whole
from mel_fast.packing import PackedBatch
from mel_fast.types import Sample

SPIKING = ("loss/total", "optim/grad_norm")
LEAST = 20
"""Steps that must be known before one can be called unusual."""
ROUNDING = 1e-4
"""Less than that is no leap: on-policy the surrogate is 0 but for rounding."""


class Diverged(InputError):
    """Update after update was not finite; names the samples' file and what to do."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One optimizer step, as the books need it."""

    samples: Sequence[Sample]  # [S]; on rank 0 only
    pulls: list[float]  # [S], the same on every rank
    norm: float  # of the whole gradient, before clipping

    @property
    def finite(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.norm) and all(map(math.isfinite, self.pulls))

    def to_blame(self) -> list[int]:
        """The samples whose pull is not finite; all, where the fault is in none of them alone."""
        found = [index for index, pull in enumerate(self.pulls) if not math.isfinite(pull)]
        return found or list(range(len(self.pulls)))


def pulls(batch: PackedBatch, per_token: Tensor, loss: Tensor) -> Tensor:
    """The pull of each sequence of a micro-batch, [B] float64.

    Args:
        per_token: [T], norm of the gradient at the embedding's output.
        loss: of the micro-batch. Where it is not finite although all gradients are, no sequence can be told apart, and
            all are given its value.
    """
    squares = torch.segment_reduce(per_token.double().square(), "sum", offsets=batch.cu_seqlens.long())
    whole = squares.sqrt()
    return torch.where(whole.isfinite().all(), whole + 0 * loss.detach(), whole)


def write_skipped(path: Path, step: int, outcomes: Iterable[Outcome], decode: Callable[[list[int]], str]) -> list[str]:
    """Writes the samples to blame for every step that was skipped, one JSON line each; returns their prompts."""
    rows = [
        {
            "step": step,
            "update": number,
            "prompt": sample.origin,
            "kind": sample.kind,
            "pull": repr(outcome.pulls[index]),  # text: JSON has no NaN
            "ids": sample.ids.tolist(),
            "text": decode(sample.ids.tolist()),
        }
        for number, outcome in enumerate(outcomes, 1)
        if not outcome.finite
        for index in outcome.to_blame()
        for sample in [outcome.samples[index]]
    ]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return sorted({str(row["prompt"]) for row in rows})


def hardest(outcomes: Iterable[Outcome], count: int = 3) -> str:
    """The prompts that pull hardest, with their shares of the sum of squares: `p7 81%, p2 9%`."""
    squares: defaultdict[str, float] = defaultdict(float)
    for outcome in outcomes:
        for sample, pull in zip(outcome.samples, outcome.pulls, strict=True):
            squares[sample.origin] += pull * pull
    whole = sum(squares.values()) or 1.0
    first = sorted(squares, key=lambda origin: -squares[origin])[:count]
    return ", ".join(f"{origin or 'unnamed'} {squares[origin] / whole:.0%}" for origin in first)


class Spikes:
    """Tells a leap of the loss or of the gradient's norm from what the last steps had.

    Its memory is the metrics of finished steps, so that a resumed run, which reads them again, sees what an
    uninterrupted one sees.

    Args:
        deviations: of the median, in robust standard deviations (1.4826 times the median distance from it).
        window: steps looked back on.
        lines: metrics of earlier steps.
    """

    def __init__(self, deviations: float, window: int, lines: Iterable[Mapping[str, float]]) -> None:
        self.deviations = deviations
        self._last = {name: deque[float](maxlen=window) for name in SPIKING}
        for line in lines:
            self._remember(line)

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """What is unusually high in a step's metrics, in words; then the step is remembered, too."""
        found: list[str] = []
        for name, last in self._last.items():
            value = metrics.get(name, math.nan)
            if len(last) < LEAST or not math.isfinite(value):
                continue
            middle = median(last)
            deviation = 1.4826 * median(abs(old - middle) for old in last)
            # Where all steps were alike, the deviation is next to nothing, and so is many times of it.
            if value - middle > max(self.deviations * deviation, abs(middle), ROUNDING):
                found.append(f"{name} {value:.4g}, usually {middle:.4g} +- {deviation:.2g} (last {len(last)} steps)")
        self._remember(metrics)
        return found

    def _remember(self, metrics: Mapping[str, float]) -> None:
        for name, last in self._last.items():
            value = metrics.get(name, math.nan)
            if math.isfinite(value) and value != 0:  # a step without an update says nothing of their size
                last.append(value)
