"""Publishing weights to all servers, so that none ever samples from weights that are not the newest.

A server that cannot be reached, or says no, gets no more requests until it has been restored from the copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.group import GroupSender
from mel_fast.rollout.sglang.receivers import Receivers
from mel_fast.rollout.sglang.server import Final, Server, epitaph
from mel_fast.rollout.sglang.transport import Bucket, Copy, buckets, send_files, send_tensors, serialised

log = logging.getLogger(__name__)


class Publisher:
    """Args:
    servers: all of them; more may be lost or come back at any time.
    config: settings.
    model_path: what servers serve before anything is published.
    dtype: of the weights that are sent.
    copy: where the newest weights are kept, if they are.
    call: runs a coroutine in the engine's event loop and waits for its result.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        config: SGLangConfig,
        model_path: str,
        dtype: torch.dtype,
        copy: Copy | None,
        call: Callable[[Coroutine[Any, Any, Any]], Any],
    ) -> None:
        self.servers, self.config, self.model_path, self.dtype = servers, config, model_path, dtype
        self.copy, self.call = copy, call
        self.version = 0  # of the weights that all have been sent
        self.newest = 0  # of those that are being sent, if any
        self._published = False
        self._checksum: str | None = None  # of the newest weights, as a server computes it
        self._group = GroupSender(config.tp, call)
        self._lock = asyncio.Lock()  # in the engine's loop: one change of weights at a time
        self._receivers = Receivers([], config.load_timeout_s)

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Called outside of the engine's loop. Requests that are running wait, and go on with the new weights.

        Raises:
            EngineError: no server took them and none can be restored, or servers hold different weights afterwards.
        """
        try:
            self.call(self._begin(version))
            for bucket, last in buckets(weights, self.dtype, self.config.bucket_mib * 2**20):
                if self.copy is not None:
                    self.copy.add(bucket, version)
                if self.config.weights == "tensor":
                    self.call(self._send_tensors(bucket, version if last else None))
                elif self.config.weights == "group":
                    self._group.send(self._receivers, bucket, version if last else None)
            self.call(self._conclude(version))
        except BaseException as error:
            self.call(self._receivers.all_failed(error))
            raise
        finally:
            self.call(self._end())
        if not self._receivers and all(server.gone.is_set() for server in self.servers):
            raise EngineError(epitaph(self.servers))

    async def restore(self, server: Server) -> None:
        """Gives one server the newest weights and opens it.

        Raises:
            Final: there is no copy of them.
            EngineError: they did not arrive.
        """
        async with self._lock:
            if self._published:
                await self._resend(server)
                if self._checksum is not None and (found := await _checksum(server)) != self._checksum:
                    raise EngineError(f"{server.name} was restored, but its weights have another checksum ({found})")
            elif server.process is None:  # an attached server may serve anything
                await self._update_from(server, self.model_path)
            # It may have been lost while it was paused.
            await server.client.post("/continue_generation", self.config.load_timeout_s)
            server.gate.reset()
            server.open()

    def release(self) -> None:
        """Frees the servers' device memory until the next publication."""
        if self.config.takes_turns:
            self.call(self._release())

    def leave(self) -> None:
        """Ends the group."""
        self._group.close(server for server in self.servers if server.process is None and server.ready.is_set())

    # What follows runs in the engine's loop.

    async def _begin(self, version: int) -> None:
        await self._lock.acquire()
        self.newest = version
        self._receivers = self._gather()
        await self._receivers.each(self._resume)
        # Also where nothing runs: what arrives meanwhile must wait. What runs is computed anew with the new weights.
        await self._receivers.tell("/pause_generation", mode="retract")
        if self.config.weights != "disk":
            await self._receivers.tell("/begin_weight_update")

    async def _conclude(self, version: int) -> None:
        self.version, self._published, self._checksum = version, True, None
        if self.copy is not None:
            path = self.copy.finish()
            if self.config.weights == "disk":
                await self._receivers.each(lambda server: self._update_from(server, str(path)))
            self.copy.drop_older()
        if self.config.weights != "disk":
            await self._receivers.tell("/end_weight_update")
        for server in self._receivers:
            server.gate.reset()  # the caches were flushed
        if self.config.verify_weights and self._receivers:
            await self._verify()

    async def _end(self) -> None:
        await self._receivers.tell("/continue_generation")
        for server in self.servers:
            server.quiet = False
            if not server.ready.is_set():
                server.look()
        if self._lock.locked():
            self._lock.release()

    async def _verify(self) -> None:
        """All servers hold the same weights; those that do not are sent them once more."""
        sums = await self._checksums()
        if len(set(sums.values())) > 1 and self.copy is not None:
            log.warning("the servers' weights differ after publication; sending them once more")
            await self._receivers.each(self._resend)
            sums = await self._checksums()
        if len(set(sums.values())) > 1:
            raise EngineError(
                f"servers hold different weights of version {self.version}: {sums}. Servers whose tp differs cannot be "
                "compared: then set rollout.sglang.verify_weights=false"
            )
        self._checksum = next(iter(sums.values()), None)

    async def _checksums(self) -> dict[str, str]:
        sums: dict[str, str] = {}

        async def ask(server: Server) -> None:
            sums[server.name] = await _checksum(server)

        await self._receivers.each(ask)
        return sums

    async def _send_tensors(self, bucket: Bucket, version: int | None) -> None:
        payload = await asyncio.to_thread(serialised, bucket)
        tp, timeout = self.config.tp, self.config.load_timeout_s
        await self._receivers.each(lambda server: send_tensors(server.client, payload, tp, version, timeout))

    async def _resend(self, server: Server) -> None:
        """The newest weights, from the copy."""
        if self.copy is None or self.copy.path is None:
            raise Final(
                f"{server.name} cannot be restored: no copy of the weights is kept (rollout.sglang.recovery_copy="
                "false); resume the run from its newest checkpoint"
            )
        if self.config.weights == "disk":
            await self._update_from(server, str(self.copy.path))
            return
        timeout = self.config.load_timeout_s
        with suppress(EngineError):  # it says no when no update is open, as one that broke off is
            await server.client.post("/end_weight_update", timeout)
        await server.client.post("/begin_weight_update", timeout)
        for bucket, last in buckets(self.copy.read(), self.dtype, self.config.bucket_mib * 2**20):
            payload = await asyncio.to_thread(serialised, bucket)
            await send_tensors(server.client, payload, self.config.tp, self.version if last else None, timeout)
        await server.client.post("/end_weight_update", timeout)

    async def _update_from(self, server: Server, path: str) -> None:
        await send_files(server.client, Path(path), self.version, self.config.load_timeout_s)

    async def _release(self) -> None:
        async with self._lock:
            receivers = self._gather()
            # A server that computes anything, be it a check of its health, must not be asked to release.
            await receivers.tell("/pause_generation", mode="retract")
            await receivers.tell("/release_memory_occupation")
            for server in receivers:
                server.released = True

    async def _resume(self, server: Server) -> None:
        if server.released:  # asking one that has not released would crash it
            server.released = False
            await server.client.post("/resume_memory_occupation", self.config.load_timeout_s)

    def _gather(self) -> Receivers:
        receivers = Receivers(filter(_ready, self.servers), self.config.load_timeout_s)
        for server in receivers:
            server.quiet = True
        return receivers


def _ready(server: Server) -> bool:
    return server.ready.is_set()


async def _checksum(server: Server) -> str:
    answer = await server.client.post("/weights_checker", server.config.load_timeout_s, action="checksum")
    return str(answer["per_engine_checksum"])
