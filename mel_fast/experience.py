"""Contrast -> reflect -> replay -> keep: how the policy's own right and wrong solutions become meta-experiences.

One coroutine per prompt runs the whole chain, so the reflections of an early group can decode while late groups still
sample.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mel_fast.internalise import Internalise
from mel_fast.prompts import Renderer, parse_experience
from mel_fast.rollout.engine import Engine, RolloutConfig, Session
from mel_fast.types import Episode, Experience, Prompt, Request, Trajectory
from mel_fast.verify import Verifier

Seed = Callable[[str, int], int]
"""(what for, which sample) -> the seed of one request of a prompt."""


class MelConfig(BaseModel):
    """Meta-experience. `enabled: false` leaves plain RL: the twin of every run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="false: plain RL")
    pairs_per_prompt: int = Field(
        default=2, ge=1, description="contrasts of a wrong with a right solution, per mixed group"
    )
    reflect_on: Literal["contrast", "wrong"] = Field(
        default="contrast",
        description="wrong: the right solution is not shown (prompts.critique), a control: a critique without contrast",
    )
    reflection_temperature: float = Field(default=1.0, gt=0, description="of sampling a meta-experience")
    replay_temperature: float = Field(default=1.0, gt=0, description="of sampling a replay")
    validate_by_replay: bool = Field(
        default=True, description="keep M only if the replay verifies; false is a control experiment"
    )
    nll_weight: float = Field(default=1.0, ge=0, description="weight of R_MEL beside J_RLVR")
    nll_warmup_steps: int = Field(default=0, ge=0, description="steps over which that weight rises from 0")
    internalise: Internalise = Internalise()

    @property
    def reflects(self) -> bool:
        """Whether meta-experiences are written at all."""
        return self.enabled and self.internalise.reflects

    def nll_weight_at(self, step: int) -> float:
        if not self.enabled:
            return 0.0
        return self.nll_weight * min(1.0, (step + 1) / self.nll_warmup_steps if self.nll_warmup_steps else 1.0)


class Collector:
    """Samples the episodes of a step.

    Args:
        engine: where to sample.
        renderer, verifier: prompts and verdicts.
        rollout, mel: settings.
        seed: the run's; every request's seed follows from it and from (step, prompt, what for, which sample), and
            where a step has a prompt more than once, from how often it had it before.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        verifier: Verifier,
        rollout: RolloutConfig,
        mel: MelConfig,
        seed: int,
    ) -> None:
        self.engine, self.renderer, self.verifier = engine, renderer, verifier
        self.rollout, self.mel, self.seed = rollout, mel, seed

    async def collect(self, prompts: Sequence[Prompt], step: int) -> list[Episode]:
        """One episode per prompt, in order."""
        asked = zip(prompts, self._seeds(prompts, step), strict=True)
        return await asyncio.gather(*(self._episode(prompt, step, seed) for prompt, seed in asked))

    def _seeds(self, prompts: Sequence[Prompt], step: int) -> list[Seed]:
        before: Counter[tuple[str, str]] = Counter()
        seeds: list[Seed] = []
        for prompt in prompts:
            key = prompt.source, prompt.id
            again = (before[key],) if before[key] else ()  # a group of its own, not a copy
            seeds.append(partial(seed_of, self.seed, step, *key, *again))
            before[key] += 1
        return seeds

    async def _episode(self, prompt: Prompt, step: int, seed: Seed) -> Episode:
        async with self.engine.session(prompt.id) as session:
            rollouts = await self._roll_out(session, prompt, seed)
            episode = Episode(step, prompt, rollouts)
            if self.mel.reflects:
                episode.experiences = await self._reflect(session, episode, seed)
                await self._replay(session, episode, seed)
            return episode

    async def _roll_out(self, session: Session, prompt: Prompt, seed: Seed) -> list[Trajectory]:
        ids, temperature = self.renderer.solve(prompt), self.rollout.temperature
        requests = [self._request(ids, seed("solve", i), temperature) for i in range(self.rollout.group_size)]
        return await self._verified(await self._sample(session, requests), prompt)

    async def _reflect(self, session: Session, episode: Episode, seed: Seed) -> list[Experience]:
        """C_retro = [I, x, y-, y+] -> M. Critiques of a single wrong solution are written on the same pairs."""
        right = [i for i, t in enumerate(episode.trajectories) if t.correct]
        wrong = [i for i, t in enumerate(episode.trajectories) if not t.correct]
        lengths = [len(t.output_ids) for t in episode.trajectories]
        pairs: list[tuple[int, int]] = []
        requests: list[Request] = []
        for w, r in contrast_pairs(wrong, right, lengths, self.mel.pairs_per_prompt):
            context = self._retrospect(episode, w, r)
            if len(context) + self.rollout.max_new_tokens > self.engine.context_length:
                _count(episode, "reflection_beyond_context")
                continue
            pairs.append((w, r))
            requests.append(self._request(context, seed("reflect", len(pairs)), self.mel.reflection_temperature))
        experiences: list[Experience] = []
        for (w, r), reflection in zip(pairs, await self._sample(session, requests), strict=True):
            meta, malformed = parse_experience(reflection.text, episode.prompt.answer)
            if reflection.finish_reason != "stop":
                meta, malformed = None, "truncated"
            experiences.append(Experience(w, r, reflection, meta, malformed))
        return experiences

    def _retrospect(self, episode: Episode, wrong: int, right: int) -> list[int]:
        """What a meta-experience is written on, as token ids."""
        attempt = episode.trajectories[wrong].output_ids
        if self.mel.reflect_on == "wrong":
            return self.renderer.critique(episode.prompt, attempt)
        return self.renderer.reflect(episode.prompt, attempt, episode.trajectories[right].output_ids)

    async def _replay(self, session: Session, episode: Episode, seed: Seed) -> None:
        """A fresh attempt with M in the prompt. Only an M whose replay verifies is kept."""
        replayed: list[Experience] = []
        requests: list[Request] = []
        for experience in (x for x in episode.experiences if x.meta is not None):
            ids = self.renderer.replay(episode.prompt, experience.reflection.output_ids)
            if len(ids) + self.rollout.max_new_tokens > self.engine.context_length:
                _count(episode, "replay_beyond_context")
                continue
            replayed.append(experience)
            requests.append(self._request(ids, seed("replay", len(replayed)), self.mel.replay_temperature))
        replays = await self._verified(await self._sample(session, requests), episode.prompt)
        for experience, replay in zip(replayed, replays, strict=True):
            experience.replay = replay
            experience.kept = replay.correct or not self.mel.validate_by_replay

    async def _sample(self, session: Session, requests: Sequence[Request]) -> list[Trajectory]:
        if not requests:
            return []
        completions = await session.generate(requests)
        return [
            Trajectory(
                request.prompt_ids,
                completion.output_ids,
                completion.logprobs,
                completion.finish_reason,
                completion.versions,
                self.renderer.decode(completion.output_ids),
                cached_tokens=completion.cached_tokens,
                cache=completion.cache,
            )
            for request, completion in zip(requests, completions, strict=True)
        ]

    async def _verified(self, trajectories: list[Trajectory], prompt: Prompt) -> list[Trajectory]:
        verdicts = await asyncio.gather(*(self.verifier.score(t.text, prompt.answer, prompt) for t in trajectories))
        for trajectory, verdict in zip(trajectories, verdicts, strict=True):
            trajectory.reward, trajectory.correct, trajectory.reason = verdict.score, verdict.correct, verdict.reason
        return trajectories

    def _request(self, ids: list[int], seed: int, temperature: float) -> Request:
        return Request(ids, seed, self.rollout.max_new_tokens, temperature)


def _count(episode: Episode, dropped: str) -> None:
    episode.dropped[dropped] = episode.dropped.get(dropped, 0) + 1


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def contrast_pairs(
    wrong: Sequence[int], right: Sequence[int], lengths: Sequence[int], count: int
) -> list[tuple[int, int]]:
    """Chooses (wrong, right) pairs from Y- x Y+ so that every trajectory is covered as evenly as can be.

    Each wrong one gets floor(count / wrongs) pairs and the longest ones one more; the right ones take turns, shortest
    first. No pair occurs twice, and pairs with the same wrong one stand together (they share the longest prefix).

    Args:
        wrong, right: indices of trajectories.
        lengths: of all trajectories, in tokens.
        count: pairs wanted; fewer come back when fewer exist.
    """
    if not wrong or not right:
        return []
    count = min(count, len(wrong) * len(right))
    share, extra = divmod(count, len(wrong))
    turns = sorted(right, key=lambda i: (lengths[i], i))
    pairs: list[tuple[int, int]] = []
    position = 0
    for place, w in enumerate(sorted(wrong, key=lambda i: (-lengths[i], i))):
        for _ in range(share + (place < extra)):
            pairs.append((w, turns[position % len(turns)]))
            position += 1
    return pairs
