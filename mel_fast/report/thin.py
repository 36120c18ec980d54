"""Choosing evenly from more than a page can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the dumps a report embeds. What is left out is said in it."""

    experiences: int = 10_000
    characters: int = 64_000_000  # of the experiences' texts
    rollout_steps: int = 20
    tokens: int = 1_000_000  # of the rollouts
    dump_bytes: int = 2_000_000_000  # to be read at all: somewhat over a minute

    def share(self, runs: int) -> Limits:
        """Each run's part."""
        names = ("experiences", "characters", "tokens", "dump_bytes")
        return replace(self, **{name: max(1, getattr(self, name) // runs) for name in names})


@dataclass(slots=True)
class Thinner(Generic[T]):
    """Keeps every k-th item of a stream; k doubles whenever their count or total size goes beyond its limit."""

    count: int
    size: int
    seen: int = 0
    _stride: int = 1
    _kept: list[tuple[T, int]] = field(default_factory=list)
    _total: int = 0

    def offer(self, make: Callable[[], tuple[T, int]]) -> None:
        """The next item and its size; `make` is not called for one that is not kept."""
        if self.seen % self._stride == 0:
            self._kept.append(make())
            self._total += self._kept[-1][1]
            while len(self._kept) > 1 and (len(self._kept) > self.count or self._total > self.size):
                self._kept = self._kept[::2]
                self._total = sum(size for _, size in self._kept)
                self._stride *= 2
        self.seen += 1

    def kept(self) -> list[T]:
        return [item for item, _ in self._kept]


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at equal distances, the first and the last among them (a single one is the last)."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return list(items[-1:]) if count else []
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
