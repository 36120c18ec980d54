"""All servers together: which prompt goes where, and what happens when a server is lost.

The engine has an event loop and a thread of its own, so that servers are looked after, and lost ones come back, also
while the trainer computes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import torch
from torch import Tensor

from mel_fast.errors import EngineError, InputError
from mel_fast.rollout.prefixes import as_bytes, distinct_tokens
from mel_fast.rollout.sglang.client import Client
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.process import ServerProcess
from mel_fast.rollout.sglang.publisher import Publisher
from mel_fast.rollout.sglang.server import Server, ServerLost, epitaph
from mel_fast.rollout.sglang.transport import Copy, choose_parent
from mel_fast.types import Completion, Request

log = logging.getLogger(__name__)
T = TypeVar("T")
FAULTS = 8  # connection faults of one request at servers that are healthy: then something else is wrong


class SGLangEngine:
    """Args:
    config: settings.
    processes: servers to launch; empty: attach to `config.urls`.
    model_path: what servers serve before anything is published.
    model_bytes: of its weights as `dtype`.
    dtype: of the weights they are sent.
    stop_ids: tokens that end a response.
    vocabulary: number of token ids the model knows.
    context_length: of the model, in tokens.
    folder: the run's, for weights where shared memory is short.

    Use it as a context manager.
    """

    def __init__(
        self,
        config: SGLangConfig,
        processes: Sequence[ServerProcess],
        *,
        model_path: str,
        model_bytes: int,
        dtype: torch.dtype,
        stop_ids: Sequence[int],
        vocabulary: int,
        context_length: int,
        folder: Path,
    ) -> None:
        self.config, self.processes, self.stop_ids = config, list(processes), list(stop_ids)
        self.vocabulary, self.context_length = vocabulary, context_length
        self.servers: list[Server] = []
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Event()  # a server came or went
        self._watching: list[asyncio.Task[None]] = []
        self._http: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-engine", daemon=True)
        keeps_copy = config.weights == "disk" or config.recovery_copy
        copy = Copy(choose_parent(config.weights_folder, folder, model_bytes)) if keeps_copy else None
        self.publisher = Publisher(self.servers, config, model_path, dtype, copy, self._call)

    def __enter__(self) -> SGLangEngine:
        self._thread.start()
        try:
            self._call(self._open())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what this run launched. Attached servers stay as they are."""
        try:
            self.publisher.leave()
        finally:
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            if self.publisher.copy is not None:
                self.publisher.copy.close()

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine`. Requests under way are computed anew and go on with the new weights."""
        self.publisher.publish(weights, version)

    def release(self) -> None:
        self.publisher.release()

    def take_metrics(self) -> dict[str, float]:
        counts, self._counts = self._counts, Counter()
        for server in self.servers:
            counts["impatient"] += server.gate.impatient
            server.gate.impatient = 0
        ready = sum(server.ready.is_set() for server in self.servers)
        names = ("lost", "moved", "retried", "impatient")
        return {f"engine/{name}": float(counts[name]) for name in names} | {"engine/servers": float(ready)}

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[SGLangSession]:
        session = SGLangSession(self)
        try:
            yield session
        finally:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(session.leave)

    async def complete(self, session: SGLangSession, request: Request) -> Completion:
        """One completion, whatever becomes of the servers meanwhile. In the engine's loop."""
        attempts = faults = 0
        while True:
            server = await self.seat(session)
            oldest = self.publisher.version
            try:
                completion = await server.complete(request)
            except ServerLost:
                self._counts["moved"] += 1
                continue
            except (aiohttp.ClientError, OSError) as error:
                self._counts["retried"] += 1
                attempts += 1
                if await server.checked() and not server.quiet:
                    faults += 1
                if faults > FAULTS:
                    raise EngineError(
                        f"{server.name}: {faults} connection faults of one request though it is healthy; the last: "
                        f"{type(error).__name__}: {error}"  # not its repr, which can contain the API key
                    ) from None
                await asyncio.sleep(min(5.0, 0.1 * 2**attempts))
                continue
            if all(oldest <= version <= self.publisher.newest for version, _ in completion.versions):
                return completion
            self._counts["retried"] += 1
            server.condemn(f"it serves other weights than those published ({completion.versions[0][0]})")

    async def seat(self, session: SGLangSession) -> Server:
        """The server of a session: where it was before, else the ready one with the fewest sessions."""
        while session.server is None or not session.server.ready.is_set():
            ready = [server for server in self.servers if server.ready.is_set()]
            if ready:
                session.move(min(ready, key=lambda server: server.sessions))
            elif all(server.gone.is_set() for server in self.servers):
                raise EngineError(epitaph(self.servers))
            else:
                await self._changed.wait()
        return session.server

    def check(self, requests: Sequence[Request]) -> None:
        """Raises InputError for a token id that would kill a server."""
        for request in requests:
            if not request.prompt_ids or not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocabulary:
                raise InputError(
                    f"a prompt needs token ids from 0 to {self.vocabulary - 1}; got "
                    f"{[i for i in request.prompt_ids if not 0 <= i < self.vocabulary][:5] or 'none'}: do tokenizer "
                    "and model belong together?"
                )

    async def _open(self) -> None:
        key = _api_key(self.config)
        self._http = aiohttp.ClientSession(
            # Servers drop connections that were idle for 5 s: ours must be gone before, or a request meets a dead one.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        for process in self.processes:
            self._add(f"server {len(self.servers)}", "", process)
        for url in () if self.processes else self.config.urls:
            self._add(url, url, None)
        await asyncio.gather(*(self._start(server) for server in self.servers))
        self._watching = [asyncio.create_task(self._watch(server)) for server in self.servers]

    def _add(self, name: str, url: str, process: ServerProcess | None) -> None:
        assert self._http is not None
        client = Client(self._http, url, self.stop_ids)
        self.servers.append(Server(name, client, process, self.config, self.publisher.restore, self._server_changed))

    async def _start(self, server: Server) -> None:
        await server.start()
        await self.publisher.restore(server)

    async def _watch(self, server: Server) -> None:
        try:
            await server.watch()
        except Exception as error:  # of ours: without this nobody would bring it back, and sessions would wait forever
            log.exception("%s is not looked after any more", server.name)
            await server.give_up(f"{type(error).__name__}: {error}")

    def _server_changed(self, server: Server) -> None:
        if not server.ready.is_set() and not server.gone.is_set():
            self._counts["lost"] += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self.processes))
        if self._http is not None:
            await self._http.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it in the engine's loop, from another thread."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    async def elsewhere(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs it in the engine's loop, from another loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))


class SGLangSession:
    """The sampling of one prompt, on one server as long as that lives."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine = engine
        self.server: Server | None = None

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Session`.

        Raises:
            InputError: a prompt is too long for the servers, or has token ids that the model does not know.
            EngineError: no server is left, or one answers with something else than a completion.
        """
        self.engine.check(requests)
        return await self.engine.elsewhere(self._generate(requests))

    async def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        server = await self.engine.seat(self)
        open_prompts = dict(enumerate(as_bytes(request.prompt_ids) for request in requests))
        async with server.window.hold(distinct_tokens(list(open_prompts.values()))) as keep:

            async def complete(place: int, request: Request) -> Completion:
                completion = await self.engine.complete(self, request)
                del open_prompts[place]
                keep(distinct_tokens(list(open_prompts.values())))
                return completion

            tasks = [asyncio.create_task(complete(place, request)) for place, request in enumerate(requests)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:  # when one fails, nobody waits for the others
                    task.cancel()

    def move(self, server: Server) -> None:
        self.leave()
        self.server = server
        server.sessions += 1

    def leave(self) -> None:
        if self.server is not None:
            self.server.sessions -= 1
            self.server = None


def _api_key(config: SGLangConfig) -> str:
    """The key of attached servers, or "". No message has it in it.

    Raises:
        InputError: the variable is not set, or what it holds cannot be a key.
    """
    variable = config.api_key_variable
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()  # files that keys come from end in a newline
    if not key:
        raise InputError(f"rollout.sglang.api_key_variable={variable} is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"rollout.sglang.api_key_variable: what {variable} holds has characters that no key has")
    for url in config.urls:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            log.warning("%s: the API key and all texts travel unencrypted; use https, or a network you trust", url)
    return key
