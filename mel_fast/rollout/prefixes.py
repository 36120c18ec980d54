"""Common prefixes of prompts, as a prefix cache sees them.

Prompts are compared as bytes, 4 for each token and the highest first: then the order of bytes objects is the order of
token sequences, and in sorted order each prompt's longest common prefix is with a neighbour.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np


def as_bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=">u4").tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """Length of the longest common prefix, in tokens."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // 4
    differing = np.frombuffer(a, np.uint32, size // 4) != np.frombuffer(b, np.uint32, size // 4)
    return int(differing.argmax())


class PrefixSet:
    """Prompts, and the longest prefix that a new one shares with any of them."""

    def __init__(self) -> None:
        self._sorted: list[bytes] = []

    def add(self, prompt: bytes) -> None:
        place = bisect_left(self._sorted, prompt)
        if self._sorted[place : place + 1] != [prompt]:
            self._sorted.insert(place, prompt)

    def remove(self, prompt: bytes) -> None:
        place = bisect_left(self._sorted, prompt)
        assert self._sorted[place] == prompt
        del self._sorted[place]

    def nearest(self, prompt: bytes) -> tuple[int, bytes | None]:
        """Tokens shared with the prompt that shares most, and that prompt."""
        place = bisect_left(self._sorted, prompt)
        neighbours = self._sorted[max(0, place - 1) : place + 1]
        return max(((common_tokens(prompt, other), other) for other in neighbours), default=(0, None), key=_first)

    def forget(self, prompt: bytes, beyond: int) -> None:
        """Removes the prompts that share more than `beyond` tokens with this one."""
        while True:
            shared, other = self.nearest(prompt)
            if other is None or shared <= beyond:
                return
            self.remove(other)

    def clear(self) -> None:
        self._sorted.clear()


def shareable_tokens(prompts: Iterable[bytes]) -> int:
    """Prompt tokens that a perfect prefix cache need not compute: all but the nodes of the prompts' prefix tree.

    The last token of a prompt is always computed, as its logits give the first token of the answer.
    """
    ordered = sorted(prompts)
    return sum(min(common_tokens(a, b), len(b) // 4 - 1) for a, b in pairwise(ordered))


def distinct_tokens(prompts: Sequence[bytes]) -> int:
    """Nodes of the prompts' prefix tree: what they occupy in a cache together."""
    ordered = sorted(prompts)
    return sum(len(p) // 4 for p in ordered) - sum(common_tokens(a, b) for a, b in pairwise(ordered))


def _first(pair: tuple[int, bytes | None]) -> int:
    return pair[0]
