"""The servers that take part in one publication."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import aiohttp

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.server import Server

FAULTS = (EngineError, aiohttp.ClientError, TimeoutError, OSError)


class Receivers:
    """Those that have got all of it so far. One that fails is none any more, and gets no requests until it is restored.

    Everything here runs in the engine's event loop.

    Args:
        servers: that are ready when the publication begins.
        timeout_s: for each call.
    """

    def __init__(self, servers: Iterable[Server], timeout_s: float) -> None:
        self._servers = list(servers)
        self.timeout_s = timeout_s

    def __iter__(self) -> Iterator[Server]:
        return iter(list(self._servers))

    def __len__(self) -> int:
        return len(self._servers)

    async def each(self, action: Callable[[Server], Coroutine[Any, Any, Any]]) -> None:
        """Does it for all at once."""
        chosen = list(self._servers)
        results = await asyncio.gather(*(action(server) for server in chosen), return_exceptions=True)
        for server, result in zip(chosen, results, strict=True):
            if isinstance(result, FAULTS):
                self.failed(server, result)
            elif isinstance(result, BaseException):
                raise result

    async def tell(self, path: str, **body: object) -> None:
        await self.each(lambda server: server.client.post(path, self.timeout_s, **body))

    def failed(self, server: Server, error: BaseException) -> None:
        if server in self._servers:
            self._servers.remove(server)
        server.condemn(f"weights could not be published to it: {error or type(error).__name__}")

    async def all_failed(self, error: BaseException) -> None:
        for server in self:
            self.failed(server, error)
