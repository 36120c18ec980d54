"""A training step's sampling with imposed lengths: rollouts only, phase by phase, and as the trainer does it.

A tiny random model cannot solve, judge or reflect, so what depends on the text is a stand-in: verdicts alternate, every
reflection is well-formed, and how long an answer gets is drawn from a log-normal distribution by its request's seed.
All else is the trainer's own: the collector, the pair rule, the engine, the gate, and real servers. Lengths, verdicts
and pairs are the same in every run, so the work is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from benchmarks.timed_servers import VOCABULARY, Forward
from mel_fast.experience import Collector, MelConfig
from mel_fast.prompts import Renderer
from mel_fast.rollout.engine import Engine, RolloutConfig, Session
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.types import Completion, Episode, Prompt, Request
from mel_fast.verify import Verdict, Verifier

PHASES = ("solve", "reflect", "replay")  # the first token of a prompt says which: 1, 2 or 3
MEMO = "Bifurcation: the second line.\nCritique: I rushed.\nHeuristics: when terms cancel, check signs."


@dataclass(frozen=True)
class Lengths:
    """Of answers, in tokens: log-normal, bounded."""

    median: dict[str, float] = field(default_factory=lambda: {"solve": 80.0, "reflect": 60.0, "replay": 80.0})
    sigma: float = 0.8
    longest: int = 600

    def draw(self, phase: str, seed: int) -> int:
        length = self.median[phase] * math.exp(self.sigma * np.random.default_rng(seed).standard_normal())
        return int(min(max(length, 8), self.longest))


class Texts:
    """Stands in for the renderer: prompts of random tokens with the shares that real ones have in common."""

    def __init__(self) -> None:
        self._instruction = {phase: [1 + place, *_tokens(60, place)] for place, phase in enumerate(PHASES)}

    def solve(self, prompt: Prompt) -> list[int]:
        return self._instruction["solve"] + self._question(prompt)

    def reflect(self, prompt: Prompt, wrong: Sequence[int], right: Sequence[int]) -> list[int]:
        return [*self._instruction["reflect"], *self._question(prompt), 4, *wrong, 5, *right, 6]

    def replay(self, prompt: Prompt, experience: Sequence[int]) -> list[int]:
        return [*self._instruction["replay"], *experience, 7, *self._question(prompt)]

    def decode(self, output_ids: Sequence[int]) -> str:
        return MEMO

    def _question(self, prompt: Prompt) -> list[int]:
        return _tokens(100, 1000 + int(prompt.id))


class Verdicts:
    """Stands in for the verifier: of a group every second response is right, and so is every replay."""

    def __init__(self, group_size: int) -> None:
        self.group_size, self._asked = group_size, Counter[str]()

    async def score(self, response: str, answer: str, prompt: Prompt) -> Verdict:
        place = self._asked[prompt.id]
        self._asked[prompt.id] += 1
        right = place >= self.group_size or place % 2 == 1
        return Verdict(float(right), right, "")


@dataclass
class Asked:
    """One request, from when it was asked for to when it was answered, in seconds on time.monotonic."""

    phase: str
    start: float
    end: float


class Imposed:
    """The engine, with lengths imposed and a diary of the requests."""

    def __init__(self, engine: SGLangEngine, lengths: Lengths) -> None:
        self.engine, self.lengths = engine, lengths
        self.context_length = engine.context_length
        self.diary: list[Asked] = []

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[Session]:
        async with self.engine.session(key) as session:
            yield _ImposedSession(self, session)


class _ImposedSession:
    def __init__(self, engine: Imposed, session: Session) -> None:
        self.engine, self.session = engine, session

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Like the trainer's, but the diary needs to know when each ends: so they are asked for one by one."""
        return list(await asyncio.gather(*map(self._one, requests)))

    async def _one(self, request: Request) -> Completion:
        phase, start = PHASES[request.prompt_ids[0] - 1], time.monotonic()
        wanted = self.engine.lengths.draw(phase, request.seed)
        (found,) = await self.session.generate([replace(request, max_new_tokens=wanted)])
        assert len(found.output_ids) == wanted
        self.engine.diary.append(Asked(phase, start, time.monotonic()))
        return replace(found, finish_reason="stop")


class PhaseByPhase(Collector):
    """The same work with a barrier behind the rollouts, and one behind the reflections."""

    async def collect(self, prompts: Sequence[Prompt], step: int) -> list[Episode]:
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(self.engine.session(prompt.id)) for prompt in prompts]
            seeds = self._seeds(prompts, step)
            groups = await asyncio.gather(*map(self._roll_out, sessions, prompts, seeds))
            episodes = [Episode(step, prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
            experiences = await asyncio.gather(*map(self._reflect, sessions, episodes, seeds))
            for episode, found in zip(episodes, experiences, strict=True):
                episode.experiences = found
            await asyncio.gather(*map(self._replay, sessions, episodes, seeds))
            return episodes


def step(
    engine: SGLangEngine, schedule: str, prompts: int, group_size: int, lengths: Lengths
) -> tuple[list[Episode], list[Asked], float]:
    """Samples one step. Returns the episodes, the diary, and when it began."""
    imposed = Imposed(engine, lengths)
    rollout = RolloutConfig(group_size=group_size, max_new_tokens=lengths.longest)
    kind = PhaseByPhase if schedule == "phase by phase" else Collector
    collector = kind(
        cast("Engine", imposed),
        cast("Renderer", Texts()),
        cast("Verifier", Verdicts(group_size)),
        rollout,
        MelConfig(enabled=schedule != "rollouts only"),
        seed=0,
    )
    begin = time.monotonic()
    return asyncio.run(collector.collect([Prompt(str(i), "", "") for i in range(prompts)], 0)), imposed.diary, begin


def check(episodes: Sequence[Episode], schedule: str, prompts: int, group_size: int) -> dict[str, int]:
    """The gate before any figure: all that should have been sampled was. Returns the tokens of each phase."""
    experiences = [x for episode in episodes for x in episode.experiences]
    assert len(episodes) == prompts
    assert all(len(episode.trajectories) == group_size for episode in episodes)
    assert len(experiences) == (0 if schedule == "rollouts only" else 2 * prompts)
    assert all(x.replay is not None and x.kept for x in experiences)
    return {
        "solve": sum(len(t.output_ids) for episode in episodes for t in episode.trajectories),
        "reflect": sum(len(x.reflection.output_ids) for x in experiences),
        "replay": sum(len(x.replay.output_ids) for x in experiences if x.replay is not None),
    }


def occupancy(forwards: Sequence[Forward], begin: float, end: float) -> dict[str, Any]:
    """Of the server between two moments: mean number of requests in a forward pass over time, and share without one."""
    inside = [f for f in forwards if begin <= f.start < end]
    span = end - begin
    return {
        "mean_requests": sum(f.requests * f.seconds for f in inside) / span,
        "busy_share": sum(f.seconds for f in inside) / span,
        "passes": len(inside),
    }


def _tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(8, VOCABULARY, count).tolist()
