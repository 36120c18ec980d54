"""Dumped episodes -> what the rollout viewer shows: groups, their advantages, and the log-prob of every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from mel_fast.objective import ObjectiveConfig, group_advantages, shaped_reward
from mel_fast.report.experiences import SNIPPET, finite, question
from mel_fast.report.runs import Run
from mel_fast.report.thin import Limits, Thinner
from mel_fast.report.tokens import Vocabulary
from mel_fast.types import Episode

TOKENS_PER_CHUNK = 50_000


class Rollouts:
    """Collects the groups of one run, an even part of them when there are too many."""

    def __init__(self, run: int, source: Run, vocabulary: Vocabulary, limits: Limits) -> None:
        self._run, self._vocabulary = run, vocabulary
        self._objective, self._max_new_tokens, self.note = _objective(source)
        self._thinner: Thinner[dict[str, Any]] = Thinner(limits.tokens, limits.tokens)

    def add(self, step: int, episodes: Sequence[Episode]) -> None:
        """Those of one dump: a whole step, since advantages may depend on all of its groups."""
        coefficients = self._coefficients(episodes)
        for place, (episode, values) in enumerate(zip(episodes, coefficients, strict=True)):
            self._thinner.offer(lambda p=place, e=episode, v=values: self._record(step, p, e, v))

    def records(self) -> list[dict[str, Any]]:
        """With ids as places in the vocabulary's table, which from now on has those of these groups alone."""
        for record in (records := self._thinner.kept()):
            record["prompt"] = self._vocabulary.places(record["prompt"])
            for response in record["responses"]:
                response["ids"] = self._vocabulary.places(response["ids"])
        return records

    @property
    def seen(self) -> int:
        return self._thinner.seen

    def _coefficients(self, episodes: Sequence[Episode]) -> list[list[tuple[float | None, float | None]]]:
        """(advantage, coefficient of each token's log-prob before clipping and aggregation) of every response."""
        config, limit = self._objective, self._max_new_tokens
        if config is None:
            return [[(None, None)] * len(e.trajectories) for e in episodes]
        if config.algorithm == "rft":
            return [[(None, float(t.correct)) for t in e.trajectories] for e in episodes]
        rewards = [[shaped_reward(t, config, limit) for t in e.trajectories] for e in episodes]
        masks = [
            [config.overlong == "mask" and t.finish_reason == "length" for t in episode.trajectories]
            for episode in episodes
        ]
        return [
            [(float(a), 0.0 if masked else float(a)) for a, masked in zip(group, mask, strict=True)]
            for group, mask in zip(group_advantages(rewards, config), masks, strict=True)
        ]

    def _record(
        self, step: int, place: int, episode: Episode, values: Sequence[tuple[float | None, float | None]]
    ) -> tuple[dict[str, Any], int]:
        group = episode.trajectories
        prompt = group[0].prompt_ids if group else []
        responses = [
            {
                "ids": t.output_ids,
                "logp": _hundredths(t.logprobs),
                "reward": finite(t.reward),
                "correct": t.correct,
                "reason": t.reason,
                "finish": t.finish_reason,
                "advantage": finite(advantage),
                "coefficient": finite(coefficient),
            }
            for t, (advantage, coefficient) in zip(group, values, strict=True)
        ]
        record = {
            "run": self._run,
            "step": step,
            "place": place,
            "id": episode.prompt.id,
            "family": episode.prompt.source,
            "right": sum(t.correct for t in group),
            "question": question(episode),
            "answer": episode.prompt.answer,
            "prompt": prompt,
            "responses": responses,
        }
        return record, len(prompt) + sum(len(t.output_ids) for t in group)


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What the list of the viewer needs of all groups, without their tokens; `chunk` says where those are."""
    names = ("run", "step", "place", "id", "family", "right")
    table: dict[str, list[Any]] = {name: [record[name] for record in records] for name in names}
    table["size"] = [len(record["responses"]) for record in records]
    table["snippet"] = [record["question"][:SNIPPET] for record in records]
    return table | {"chunk": chunks(records)}


def chunks(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of each group's chunk."""
    sizes = np.array([len(r["prompt"]) + sum(len(t["ids"]) for t in r["responses"]) for r in records], dtype=int)
    return (np.maximum(0, np.cumsum(sizes) - 1) // TOKENS_PER_CHUNK).tolist()


def _hundredths(logprobs: Sequence[float]) -> list[int]:
    """Hundredths of a nat. What is below -100 nats, or no number, counts as -100."""
    values = np.nan_to_num(np.asarray(logprobs, dtype=np.float64), nan=-100.0)
    return np.round(np.maximum(values, -100.0) * 100).astype(int).tolist()


def _objective(run: Run) -> tuple[ObjectiveConfig | None, int, str]:
    settings, limit = run.config.get("objective"), run.whole("rollout.max_new_tokens")
    if settings is None or limit is None:
        return None, 0, "No advantages are shown: config.yaml does not have the objective's settings."
    try:
        return ObjectiveConfig.model_validate(settings), limit, ""
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        return None, 0, f"No advantages are shown: config.yaml has objective.{key}: {problem['msg']}."
