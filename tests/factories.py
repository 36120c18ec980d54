"""Small builders and stand-ins that several tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from torch import Tensor

from mel_fast.prompts import Renderer
from mel_fast.types import (
    Completion,
    Episode,
    Experience,
    FinishReason,
    MetaExperience,
    Prompt,
    Request,
    Trajectory,
)
from mel_fast.verify import Verdict, Verifier

MEMO = "Bifurcation: the second line.\nCritique: I rushed.\nHeuristics: When terms cancel, check signs."


def make_prompt(id: str = "p1", question: str = "What is it?", answer: str = "73") -> Prompt:
    return Prompt(id, question, answer, "some-set")


def trajectory(
    reward: float = 0.0,
    length: int = 2,
    context: Sequence[int] = (1, 2, 3),
    finish: FinishReason = "stop",
    text: str = "a text",
    first: int = 10,
) -> Trajectory:
    """A response of the ids first, first + 1, ... to the ids of `context`; right when its reward is 1."""
    ids = list(range(first, first + length))
    logprobs = [-0.125 * (i + 1) for i in range(length)]
    return Trajectory(list(context), ids, logprobs, finish, [(0, length)], text, reward, reward == 1.0)


def experience(kept: bool = True, memo: int = 3, replay: Trajectory | None = None) -> Experience:
    """Of trajectories 0 and 1, with a reflection of `memo` tokens."""
    meta = MetaExperience("the second line", "I rushed.", "When terms cancel, check signs.")
    reflection = trajectory(length=memo, context=(7, 8, 9, 10), text=MEMO, first=30)
    return Experience(0, 1, reflection, meta, replay=replay or trajectory(float(kept), 4, (5, 6), first=40), kept=kept)


def episode(
    rewards: Sequence[float], lengths: Sequence[int] = (), experiences: Sequence[Experience] = (), id: str = "p1"
) -> Episode:
    lengths = lengths or [2] * len(rewards)
    group = [trajectory(r, n, first=10 * (i + 1)) for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))]
    return Episode(0, make_prompt(id), group, list(experiences))


class ScriptedEngine:
    """Answers by a rule: (text of the prompt, request, how often this prompt was asked before) -> text of the answer.

    An answer that ends in "..." is one that was cut off at its limit. `asked` holds every request.
    """

    def __init__(
        self, renderer: Renderer, answer: Callable[[str, Request, int], str], context_length: int = 100_000
    ) -> None:
        self.renderer, self.answer, self.context_length = renderer, answer, context_length
        self.asked: list[Request] = []
        self.keys: list[str] = []
        self._counts: dict[str, int] = {}

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[ScriptedEngine]:
        self.keys.append(key)
        yield self

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        raise AssertionError("nothing is published here")

    def release(self) -> None:
        pass

    def take_metrics(self) -> dict[str, float]:
        return {}

    def prompts(self) -> list[str]:
        return [self.renderer.decode(request.prompt_ids) for request in self.asked]

    def _complete(self, request: Request) -> Completion:
        self.asked.append(request)
        prompt = self.renderer.decode(request.prompt_ids)
        before = self._counts.get(prompt, 0)
        self._counts[prompt] = before + 1
        text = self.answer(prompt, request, before)
        cut = text.endswith("...")
        ids = self.renderer.encode(text) if cut else self.renderer.answer(text)
        return Completion(ids, [-0.5] * len(ids), "length" if cut else "stop", [(0, len(ids))])


class WordVerifier:
    """A response is right when it contains the word "right"."""

    async def score(self, response: str, answer: str, prompt: Prompt) -> Verdict:
        right = "right" in response
        return Verdict(float(right), right, "" if right else "no answer")


def word_verifier() -> Verifier:
    return cast("Verifier", WordVerifier())


def as_any(value: object) -> Any:
    """For values that the types forbid, and a test wants to see refused."""
    return value
