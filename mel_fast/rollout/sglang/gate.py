"""Who goes first, so that no prefix is computed twice.

A server computes a prefix once if the requests that share it come one after another. Requests that arrive together are
prefilled in one batch, and each computes all of its prompt. So the gate lets one request of each unseen prefix go
first, the leader, and the others only once the leader's first token is there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from mel_fast.rollout.prefixes import PrefixSet


class PrefixGate:
    """Args:
    patience_s: the longest a request waits in all, before it goes without its prefix.
    min_tokens: fewest tokens, beyond those that are cached already, that are worth waiting for; no fewer than the pages
        of the cache have, as only whole pages are shared.
    """

    def __init__(self, patience_s: float, min_tokens: int) -> None:
        self.patience_s, self.min_tokens = patience_s, min_tokens
        self.impatient = 0  # requests that went without
        self._cached = PrefixSet()  # prompts that the server has prefilled
        self._leading = PrefixSet()  # prompts that it is prefilling
        self._done: dict[bytes, asyncio.Event] = {}  # of each leader

    @asynccontextmanager
    async def admitted(self, prompt: bytes) -> AsyncIterator[Callable[[int], None]]:
        """Waits for the turn of a prompt. Yields what to call when it is prefilled, with the number of tokens that
        the server had cached."""
        expected = await self._wait(prompt)
        if prompt in self._done:  # sent beside its own twin: it leads nobody
            yield lambda cached: None
            return
        event = self._done[prompt] = asyncio.Event()
        self._leading.add(prompt)

        def prefilled(cached: int) -> None:
            if self._done.get(prompt) is not event:
                return  # the cache was flushed since
            self._resign(prompt)
            if cached + self.min_tokens <= expected:  # evicted: what lay beyond is not to be hoped for
                self._cached.forget(prompt, beyond=cached)
            self._cached.add(prompt)

        try:
            yield prefilled
        finally:
            if self._done.get(prompt) is event:
                self._resign(prompt)  # failed: a follower takes over

    def reset(self) -> None:
        """The server's cache is empty now."""
        self._cached.clear()
        for prompt in list(self._done):
            self._resign(prompt)

    async def _wait(self, prompt: bytes) -> int:
        """Returns how many tokens the server should have cached."""
        deadline = asyncio.get_running_loop().time() + self.patience_s
        most = len(prompt) // 4 - 1  # the last token is always computed
        while True:
            cached, coming, leader = self._cached.nearest(prompt)[0], *self._leading.nearest(prompt)
            if leader is None or coming < cached + self.min_tokens:
                return min(cached, most)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._done[leader].wait()
                continue
            self.impatient += 1
            return min(cached, most)

    def _resign(self, prompt: bytes) -> None:
        self._leading.remove(prompt)
        self._done.pop(prompt).set()


class Window:
    """Bounds the prompt tokens under way, so that prefixes are not evicted before those who share them have come.

    First come, first served. What alone is larger than the window passes when it is empty.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._used = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, tokens: int) -> AsyncIterator[Callable[[int], None]]:
        """Waits until that many fit. Yields what to call with how many are still needed, when that gets less."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((tokens, turn))
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had come
                self._used -= tokens
            self._advance()
            raise
        held = tokens

        def keep(needed: int) -> None:
            nonlocal held
            needed = min(needed, held)  # never more again: the place may be another's
            self._used -= held - needed
            held = needed
            self._advance()

        try:
            yield keep
        finally:
            keep(0)

    def _advance(self) -> None:
        while self._queue:
            tokens, turn = self._queue[0]
            if not turn.cancelled():
                if self._used and self._used + tokens > self.size:
                    return
                self._used += tokens
                turn.set_result(None)
            self._queue.popleft()
