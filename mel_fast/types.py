"""The values that flow through a training step, in order of appearance. Data flows one way:

Prompt -> Episode(trajectories, experiences) -> Sample(token ids, per-token stream / advantage / weight) -> PackedBatch

`PackedBatch` lives in `packing.py`, because only packing makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from mel_kernels import Stream

FinishReason = Literal["stop", "length"]
VersionSpan = tuple[int, int]  # (version of the weights, how many consecutive tokens they sampled)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One verifiable problem. `messages` is set when the data are chat messages already; they are shown as they are."""

    id: str
    question: str
    answer: str
    source: str = ""  # data set or problem family; evaluation groups by it
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One completion asked of an engine. The seed alone decides the random numbers, whatever runs beside it."""

    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy


@dataclass(frozen=True, slots=True)
class Completion:
    """An engine's answer. `output_ids` contains the stop token if there is one; `logprobs` are those of the
    temperature-scaled distribution, one per output token."""

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    versions: list[VersionSpan]
    cached_tokens: int | None = None  # prompt tokens that a prefix cache had already; None: the engine has none
    cache: str = ""  # names that cache: requests of one cache and one version of the weights can share prefixes


@dataclass(slots=True)
class Trajectory:
    """A completion with the prompt that it answers, its text, and its reward (0 until it is verified)."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    versions: list[VersionSpan]
    text: str
    reward: float = 0.0
    correct: bool = False
    reason: str = ""  # why the reward is what it is, when that is not plain: "no answer", "timeout", ...
    cached_tokens: int | None = None  # see `Completion`
    cache: str = ""


@dataclass(frozen=True, slots=True)
class MetaExperience:
    """M = (s*, C, H): the bifurcation point, the critique and the heuristics (MEL, section "Reflect")."""

    bifurcation: str
    critique: str
    heuristics: str


@dataclass(slots=True)
class Experience:
    """One contrast of a wrong with a right trajectory (indices into the episode) and what came of it."""

    wrong: int
    right: int
    reflection: Trajectory
    meta: MetaExperience | None  # None: malformed
    malformed: str = ""  # the reason, when malformed
    replay: Trajectory | None = None
    kept: bool = False


@dataclass(slots=True)
class Episode:
    """All that was sampled for one prompt in one step."""

    step: int
    prompt: Prompt
    trajectories: list[Trajectory]
    experiences: list[Experience] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # contrasts not reflected on or replayed, by reason


@dataclass(slots=True)
class Sample:
    """One training sequence. The arrays have one entry per token of `ids` and speak of that token as a target;
    tokens with stream 0 are context. Weights already carry every coefficient and the global denominator."""

    ids: np.ndarray  # [L] int64
    stream: np.ndarray  # [L] int8: mel_kernels.Stream
    advantage: np.ndarray  # [L] float32
    weight: np.ndarray  # [L] float32
    rollout_logp: np.ndarray  # [L] float32: the engine's log-probs, 0 where there are none
    kind: str  # what it is, for the metrics: one of `packing.KINDS`
    temperature: float = 1.0  # at which the tokens were sampled; policy log-probs are taken at it
    origin: str = ""  # id of the prompt that it comes from; for messages only


def make_sample(
    context: Sequence[int], target: Sequence[int], stream: Stream, weight: float, kind: str, origin: str = ""
) -> Sample:
    """A sample whose target tokens all carry one stream and weight; advantage and rollout log-probs are zero."""
    length, start = len(context) + len(target), len(context)
    sample = Sample(
        ids=np.fromiter((*context, *target), dtype=np.int64, count=length),
        stream=np.zeros(length, dtype=np.int8),
        advantage=np.zeros(length, dtype=np.float32),
        weight=np.zeros(length, dtype=np.float32),
        rollout_logp=np.zeros(length, dtype=np.float32),
        kind=kind,
        origin=origin,
    )
    sample.stream[start:] = stream
    sample.weight[start:] = weight
    return sample
