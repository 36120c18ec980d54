"""A server with a prefix cache, in steps: what waits when a step begins is prefilled together and shares nothing with
its own batch, only with what was prefilled before. That is how SGLang behaves."""

from __future__ import annotations

import asyncio

from mel_fast.rollout.prefixes import as_bytes, common_tokens


class RadixServer:
    """`batches` holds, for each step, the prompts and how many tokens of each were cached: whole pages."""

    def __init__(self, page: int = 1) -> None:
        self.page = page
        self.cache: set[bytes] = set()
        self.batches: list[list[tuple[list[int], int]]] = []
        self._waiting: list[tuple[list[int], asyncio.Future[int]]] = []

    async def prefill(self, prompt: list[int]) -> int:
        """Returns the number of cached tokens when the prompt is prefilled."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, done))
        return await done

    def step(self) -> None:
        waiting = [(prompt, done) for prompt, done in self._waiting if not done.done()]  # done: cancelled meanwhile
        self._waiting = []
        found = [self.cached(prompt) for prompt, _ in waiting]
        self.cache |= {as_bytes(prompt) for prompt, _ in waiting}
        for (_, done), cached in zip(waiting, found, strict=True):
            done.set_result(cached)
        if waiting:
            self.batches.append([(prompt, cached) for (prompt, _), cached in zip(waiting, found, strict=True)])

    def fail(self, prompt: list[int]) -> None:
        """Breaks the connection of one waiting request."""
        done = next(done for waiting, done in self._waiting if waiting == prompt and not done.done())
        done.set_exception(ConnectionResetError())

    def waiting(self) -> list[list[int]]:
        return [prompt for prompt, done in self._waiting if not done.done()]

    def cached(self, prompt: list[int]) -> int:
        most = max((common_tokens(as_bytes(prompt), other) for other in self.cache), default=0)
        return min(most, len(prompt) - 1) // self.page * self.page

    def saved(self) -> int:
        return sum(cached for batch in self.batches for _, cached in batch)


async def settle() -> None:
    """Until nothing happens any more without a step (or the clock)."""
    for _ in range(30):
        await asyncio.sleep(0)
