"""What of a meta-experience is learnt, and in which context: kept experiences -> samples of the NLL stream (R_MEL)."""

from __future__ import annotations

from collections.abc import Sequence

from mel_kernels import Stream
from pydantic import BaseModel, ConfigDict, Field

from mel_fast.prompts import Renderer
from mel_fast.types import Episode, Experience, Prompt, Sample, make_sample

Pair = tuple[str, list[int], list[int]]
"""The prompt's id; context and target, as token ids."""


class Internalise(BaseModel):
    """Weights of the NLL terms of R_MEL; each has a denominator of its own. The paper's form is `retrospective` alone.
    `right`, `opening` and `shuffled` are controls: what is gained with them needs no reflection, or no true one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    retrospective: float = Field(
        default=1.0, ge=0, description="M given question, wrong and right solution (the paper's)"
    )
    heuristic: float = Field(
        default=0.0, ge=0, description="the heuristics given the question alone: recalled, not copied"
    )
    replay: float = Field(default=0.0, ge=0, description="the validated replay's solution given the question alone")
    conclusion: float = Field(
        default=0.0, ge=0, description="M's heuristics alone, given question, both solutions and the rest of M"
    )
    right: float = Field(
        default=0.0, ge=0, description="a control: the right solutions of mixed groups, given the question"
    )
    opening: float = Field(
        default=0.0, ge=0, description="a control: their openings alone (until `prompts.opening_end`)"
    )
    shuffled: bool = Field(
        default=False, description="a control: each experience is learnt in the place of one of another prompt's"
    )

    def forms(self) -> dict[str, float]:
        """The weights, by the kind of sample."""
        return self.model_dump(exclude={"shuffled"})

    @property
    def reflects(self) -> bool:
        """Whether any form is made of meta-experiences."""
        return any(weight for kind, weight in self.forms().items() if kind not in ("right", "opening"))


def meta_experience_samples(
    episodes: Sequence[Episode], internalise: Internalise, nll_weight: float, renderer: Renderer
) -> tuple[list[Sample], int]:
    """L_NLL (MEL, "Internalize"): for each form, the mean over kept experiences of the mean over their tokens.

    Returns:
        The samples, and how many there would be more if each kept experience had every form that is on: none is made of
        a replay that is not right, nor, under `shuffled`, where no other prompt has an experience.
    """
    kept = [(e.prompt, x) for e in episodes for x in e.experiences if x.kept]
    places = _shuffled(kept) if internalise.shuffled else [(prompt, x, x) for prompt, x in kept]
    samples: list[Sample] = []
    missing = 0
    for kind, coefficient in internalise.forms().items():
        if coefficient * nll_weight == 0:
            continue
        if kind in ("right", "opening"):
            pairs = _right(kind, episodes, renderer)
        else:
            pairs = [pair for place in places if (pair := _form(kind, *place, renderer)) is not None]
            missing += len(kept) - len(pairs)
        for origin, context, target in pairs:
            weight = coefficient * nll_weight / (len(pairs) * len(target))
            samples.append(make_sample(context, target, Stream.NLL, weight, kind, origin))
    return samples, missing


def _form(kind: str, prompt: Prompt, place: Experience, told: Experience, renderer: Renderer) -> Pair | None:
    """One form of the experience `told`, in the context of `place`: the same one, unless they are shuffled. None where
    it has none."""
    context, written = place.reflection.prompt_ids, told.reflection.output_ids
    if kind == "retrospective":
        return prompt.id, context, written
    if kind == "conclusion":
        before, heuristics = renderer.heuristics(written)
        return prompt.id, context + before, heuristics
    if kind == "heuristic":
        assert told.meta is not None  # a kept one is well-formed
        return prompt.id, renderer.recall(prompt), renderer.answer(told.meta.heuristics)
    if told.replay is not None and told.replay.correct and told.replay.output_ids:
        return prompt.id, renderer.solve(prompt), told.replay.output_ids
    return None


def _right(kind: str, episodes: Sequence[Episode], renderer: Renderer) -> list[Pair]:
    """The right solutions of mixed groups, or how they begin."""
    mixed = [e for e in episodes if not all(t.correct for t in e.trajectories)]
    right = [(e.prompt.id, t) for e in mixed for t in e.trajectories if t.correct and t.output_ids]
    whole = kind == "right"
    return [(name, t.prompt_ids, t.output_ids if whole else renderer.opening(t.output_ids)) for name, t in right]


def _shuffled(kept: Sequence[tuple[Prompt, Experience]]) -> list[tuple[Prompt, Experience, Experience]]:
    """(prompt, its experience, the next one of another prompt); empty when only one prompt has any."""
    places: list[tuple[Prompt, Experience, Experience]] = []
    for index, (prompt, place) in enumerate(kept):
        others = (x for other, x in (*kept[index:], *kept[:index]) if other != prompt)
        if (told := next(others, None)) is not None:
            places.append((prompt, place, told))
    return places
