"""One server: requests go to it while it lives; when it is lost, it is brought back and given the current weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

import aiohttp

from mel_fast.errors import EngineError, InputError
from mel_fast.rollout.prefixes import as_bytes
from mel_fast.rollout.sglang.client import Client
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.gate import PrefixGate, Window
from mel_fast.rollout.sglang.process import ServerProcess
from mel_fast.types import Completion, Request

log = logging.getLogger(__name__)


DEAD = "its process ended"


class Final(EngineError):
    """Bringing it back would not help."""


class ServerLost(Exception):
    """The server died or fell silent while a request was at it. Another server, or it itself later, can answer."""


class Server:
    """Args:
    name: for messages.
    client: its HTTP calls.
    process: the process behind it when this run launched it, else None.
    restore: called with the server when it answers again: brings its weights up to date and opens it.
    changed: called with the server when requests may go to it, and when they may not any more.
    """

    def __init__(
        self,
        name: str,
        client: Client,
        process: ServerProcess | None,
        config: SGLangConfig,
        restore: Callable[[Server], Awaitable[None]],
        changed: Callable[[Server], None],
    ) -> None:
        self.name, self.client, self.process, self.config = name, client, process, config
        self.restore, self.changed = restore, changed
        self.gate = PrefixGate(config.gate_patience_s, config.gate_min_tokens)
        self.window = Window(2**31)
        self.sessions = 0  # open ones that were placed here
        self.running = 0  # requests at the server
        self.losses = 0
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()  # it will not be brought back
        self.why_gone = ""
        self.openings = 0  # how often it was opened: a number that changes when it may have been restarted
        self.quiet = False  # its weights are changing: it may rightly be silent
        self.released = False  # its device memory
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._condemned: str | None = None  # why it must not be asked
        self._check_now = asyncio.Event()
        self._check = asyncio.Event()  # set when the next check is done

    async def start(self) -> None:
        """Raises EngineError when it does not come up, InputError when it wants another API key."""
        if self.process is not None:
            await asyncio.to_thread(self.process.kill)
            self.released = False
            self.process.start()
            self.client.url = self.process.url
        else:
            with suppress(aiohttp.ClientError, OSError):  # it is not up yet
                await self.client.post("/continue_generation", 30)  # a run that was killed may have left it paused,
                with suppress(EngineError):  # or in the middle of an update; if not, it says no
                    await self.client.post("/end_weight_update", 30)
        patience = self.config.start_timeout_s
        if not await self.client.healthy(patience, self._alive):
            ended = DEAD if not self._alive() else f"no answer for {patience:.0f} s"
            raise EngineError(f"{self.name} did not start: {ended}{self._where_to_read()}")
        info = await self.client.info()
        if info.get("incremental_streaming_output"):
            raise EngineError(f"{self.name}: start it without --incremental-streaming-output; whole answers are needed")
        self.gate.min_tokens = max(self.config.gate_min_tokens, info["page_size"])  # only whole pages are shared
        self.window = Window(int(self.config.window * info["max_total_num_tokens"]))

    def open(self) -> None:
        """From now on requests go to it."""
        self.openings += 1
        self._lost = asyncio.get_running_loop().create_future()
        self._condemned = None
        self.ready.set()
        self.changed(self)

    def condemn(self, reason: str) -> None:
        """It must not be asked any more until its weights have been restored. What runs at it is given up."""
        if self._condemned is None:
            self._condemned = reason
            self._shut()
        self.look()

    def look(self) -> None:
        """Has it looked after now."""
        self._check_now.set()

    async def complete(self, request: Request) -> Completion:
        """One completion.

        Raises:
            ServerLost: it died or fell silent meanwhile.
            InputError, EngineError, aiohttp.ClientError: see `Client.generate`.
        """
        async with AsyncExitStack() as stack:
            prefilled: Callable[[int], None] = _ignore
            if self.config.prefix_gate:
                prefilled = await stack.enter_async_context(self.gate.admitted(as_bytes(request.prompt_ids)))
            await stack.enter_async_context(self._slots)
            if not self.ready.is_set():
                raise ServerLost(self.name)
            self.running += 1
            stack.callback(self._one_less)
            answer = asyncio.ensure_future(self.client.generate(request, prefilled))
            try:
                await asyncio.wait({answer, self._lost}, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():
                    raise ServerLost(self.name)
                return replace(answer.result(), cache=f"{self.name}, opening {self.openings}")
            finally:
                answer.cancel()  # without effect once it is done

    async def checked(self) -> bool:
        """Someone met a connection fault: has the server looked after now. Whether it is healthy."""
        if self.ready.is_set():
            check = self._check
            self.look()
            await check.wait()
        return self.ready.is_set()

    async def watch(self) -> None:
        """Looks after the server for as long as the engine runs. Ends when it is gone for good."""
        while not self.gone.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._check_now.wait(), self.config.health_every_s)
            self._check_now.clear()
            if (reason := await self._fault()) is not None:
                self._shut()
            check, self._check = self._check, asyncio.Event()
            check.set()
            if reason is not None:
                await self._bring_back(reason)

    async def _fault(self) -> str | None:
        """What is wrong with it, if anything."""
        if self.released:  # its memory is the trainer's for now: nothing could be brought back
            return None
        if not self._alive():
            return DEAD
        if self.quiet:
            return None
        if self._condemned is not None:
            return self._condemned
        if await self.client.healthy(self.config.hang_after_s, self._alive_and_loud):
            return None
        if not self._alive():
            return DEAD
        return None if self.quiet else f"it gave no sign of life for {self.config.hang_after_s:.0f} s"

    async def _bring_back(self, reason: str) -> None:
        """Restarts it (or waits for it) and restores its weights, as often as it may be lost."""
        log.warning("%s is lost: %s%s", self.name, reason, self._where_to_read())
        restart = self._condemned is None or not self._alive()
        while True:
            self.losses += 1
            if self.losses > self.config.max_restarts:
                times = f"lost {self.losses} times, rollout.sglang.max_restarts={self.config.max_restarts}"
                return await self.give_up(f"{times}; the last time: {reason}")
            try:
                if restart:
                    await self.start()
                await self.restore(self)
            except (Final, InputError) as error:  # InputError: its key is another one now
                return await self.give_up(str(error))
            except (EngineError, aiohttp.ClientError, OSError) as error:
                reason = str(error) or type(error).__name__
                log.warning("%s could not be restored: %s", self.name, reason)
                restart = True  # what it lacks could not be sent to it as it is
                continue
            log.warning("%s is back", self.name)
            return None

    async def give_up(self, reason: str) -> None:
        """It will not be brought back."""
        self._shut()
        log.error("%s is given up: %s", self.name, reason)
        self.why_gone = reason
        self.gone.set()
        self.changed(self)
        if self.process is not None:
            await asyncio.to_thread(self.process.kill)

    def _shut(self) -> None:
        """No more requests; those under way raise ServerLost."""
        if self.ready.is_set():
            self.ready.clear()
            self._lost.set_result(None)
            self.gate.reset()
            self.changed(self)

    def _alive(self) -> bool:
        return self.process is None or self.process.alive

    def _alive_and_loud(self) -> bool:
        return self._alive() and not self.quiet

    def _where_to_read(self) -> str:
        if self.process is None:
            return ""
        return f"; the end of its log {self.process.log}:\n{self.process.tail()}"

    def _one_less(self) -> None:
        self.running -= 1


def epitaph(servers: Sequence[Server]) -> str:
    """Why there are no servers any more."""
    return "no rollout server is left; " + "; ".join(f"{server.name}: {server.why_gone}" for server in servers)


def _ignore(cached: int) -> None:
    pass
