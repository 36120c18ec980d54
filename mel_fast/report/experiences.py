"""Dumped episodes -> what the experience viewer shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mel_fast.report.locate import Place, bifurcation, first_difference
from mel_fast.report.thin import Limits, Thinner
from mel_fast.report.tokens import Vocabulary
from mel_fast.types import Episode, Experience, Trajectory

PER_CHUNK = 100  # experiences that are decoded together
SNIPPET = 110  # characters of a question in a list


class Experiences:
    """Collects the experiences of one run, an even part of them when there are too many."""

    def __init__(self, run: int, vocabulary: Vocabulary, limits: Limits) -> None:
        self._run, self._vocabulary = run, vocabulary
        self._thinner: Thinner[dict[str, Any]] = Thinner(limits.experiences, limits.characters)

    def add(self, step: int, episodes: Sequence[Episode]) -> None:
        """Those of one dump; `step` counts from 1, as in metrics.jsonl."""
        for place, episode in enumerate(episodes):
            for number in range(len(episode.experiences)):
                self._thinner.offer(lambda p=place, e=episode, n=number: self._record(step, p, e, n))

    def records(self) -> list[dict[str, Any]]:
        return self._thinner.kept()

    @property
    def seen(self) -> int:
        return self._thinner.seen

    def _record(self, step: int, place: int, episode: Episode, number: int) -> tuple[dict[str, Any], int]:
        x = episode.experiences[number]
        wrong, right = episode.trajectories[x.wrong], episode.trajectories[x.right]
        decode = self._vocabulary.decode if self._vocabulary.tokenizer is not None else None
        differing = first_difference((wrong.output_ids, wrong.text), (right.output_ids, right.text), decode)
        split = bifurcation(x.meta, wrong.text, right.text) if x.meta is not None else None
        record: dict[str, Any] = {
            "run": self._run,
            "step": step,
            "place": place,
            "number": number,
            "id": episode.prompt.id,
            "family": episode.prompt.source,
            "status": status(x),
            "reason": x.malformed,
            "nll": mean_nll(x.reflection),
            "question": question(episode),
            "answer": episode.prompt.answer,
            "wrong": _solution(x.wrong, wrong),
            "right": _solution(x.right, right),
            "bifurcation": None if split is None else _span(split, wrong.text),
            "difference": None
            if differing is None
            else [_span(place, t.text) for place, t in zip(differing, (wrong, right), strict=True)],
            "meta": None if x.meta is None else [x.meta.bifurcation, x.meta.critique, x.meta.heuristics],
            "reflection": {"text": x.reflection.text, "tokens": len(x.reflection.output_ids)},
            "replay": None if x.replay is None else _solution(None, x.replay),
        }
        replay = x.replay.text if x.replay else ""
        return record, sum(map(len, (record["question"], wrong.text, right.text, x.reflection.text, replay)))


def status(x: Experience) -> str:
    """kept, malformed, failed (its replay did not verify) or unreplayed (no replay fitted into the context)."""
    if x.kept:
        return "kept"
    if x.meta is None:
        return "malformed"
    return "failed" if x.replay is not None else "unreplayed"


def mean_nll(trajectory: Trajectory) -> float | None:
    """Nats per token under the policy (and temperature) that wrote it."""
    return finite(-sum(trajectory.logprobs) / len(trajectory.logprobs)) if trajectory.logprobs else None


def finite(value: float | None) -> float | None:
    """JSON has no other numbers; None is shown as a dash."""
    return value if value is not None and math.isfinite(value) else None


def question(episode: Episode) -> str:
    messages = episode.prompt.messages
    return episode.prompt.question or "\n\n".join(message["content"] for message in messages or ())


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What the list of the viewer needs of all experiences, without their texts."""
    names = ("run", "step", "place", "number", "id", "family", "status", "reason", "nll")
    table = {name: [record[name] for record in records] for name in names}
    return table | {"snippet": [record["question"][:SNIPPET] for record in records]}


def _solution(index: int | None, t: Trajectory) -> dict[str, Any]:
    return {
        "index": index,
        "text": t.text,
        "reward": finite(t.reward),
        "correct": t.correct,
        "reason": t.reason,
        "finish": t.finish_reason,
        "tokens": len(t.output_ids),
    }


def _span(place: Place, text: str) -> dict[str, Any]:
    """In UTF-16 units, as JavaScript counts."""
    start, end = (len(text[:i].encode("utf-16-le", "surrogatepass")) // 2 for i in (place.start, place.end))
    return {"start": start, "end": end, "how": place.how}
