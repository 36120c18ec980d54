"""Publishing weights to all servers, so that none ever samples from weights that are not the newest.

A server that cannot be reached, or says no, gets no more requests until it has been restored from the copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import torch
from torch import Tensor

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.server import Server
from mel_fast.rollout.sglang.transport import Bucket, Copy, Group, buckets, send_files, send_tensors, serialised

log = logging.getLogger(__name__)
FAULTS = (EngineError, aiohttp.ClientError, TimeoutError, OSError)


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
        self.version = 0
        self.released = False  # the servers' device memory
        self._published = False
        self._checksum: str | None = None  # of the newest weights, as a server computes it
        self._group: Group | None = None
        self._groups_made = 0
        self._lock = asyncio.Lock()  # in the engine's loop: one change of weights at a time
        self._receivers: list[Server] = []  # servers that have got all of this publication so far
        self._paused: list[Server] = []

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Called outside of the engine's loop. Requests that are running wait, and go on with the new weights.

        Raises:
            EngineError: no server took them, or servers hold different weights afterwards.
        """
        self.call(self._begin())
        try:
            for bucket, last in buckets(weights, self.dtype, self.config.bucket_mib * 2**20):
                if self.copy is not None:
                    self.copy.add(bucket, version)
                if self.config.weights == "tensor":
                    self.call(self._send_tensors(bucket, version if last else None))
                elif self.config.weights == "group":
                    self._broadcast(bucket, version if last else None)
            self.version, self._published = version, True
            self.call(self._conclude())
        finally:
            self.call(self._end())
        if not self._receivers and all(server.gone.is_set() for server in self.servers):
            raise EngineError("no server took the weights, and none can be restored; see the messages above")

    async def restore(self, server: Server) -> None:
        """Gives one server the newest weights and opens it.

        Raises:
            EngineError: there is no copy of them, or they did not arrive.
        """
        async with self._lock:
            if self._published:
                await self._resend(server)
                if self._checksum is not None and (found := await _checksum(server)) != self._checksum:
                    raise EngineError(f"{server.name} was restored, but its weights have another checksum ({found})")
            elif server.process is None:  # an attached server may serve anything
                await self._update_from(server, self.model_path)
            server.gate.reset()
            server.open()

    def release(self) -> None:
        """Frees the servers' device memory until the next publication."""
        if self.config.release_memory:
            self.call(self._release())

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
        if self.copy is not None:
            self.copy.close()

    # What follows runs in the engine's loop, but for `_broadcast`.

    async def _begin(self) -> None:
        await self._lock.acquire()
        self._receivers = [server for server in self.servers if server.ready.is_set()]
        for server in self._receivers:
            server.quiet = True
        if self.released:
            await self._tell("/resume_memory_occupation")
            self.released = False
        self._paused = [server for server in self._receivers if server.running]
        if self._paused:  # retracted requests are computed anew with the new weights, and then go on
            await self._tell("/pause_generation", self._paused, mode="retract")
        if self.config.weights != "disk":
            await self._tell("/begin_weight_update")

    async def _conclude(self) -> None:
        if self.copy is not None:
            path = self.copy.finish()
            if self.config.weights == "disk":
                await self._each(lambda server: self._update_from(server, str(path)))
            self.copy.drop_older()
        if self.config.weights != "disk":
            await self._tell("/end_weight_update")
        for server in self._receivers:
            server.gate.reset()  # the caches were flushed
        if self.config.verify_weights and self._receivers:
            await self._verify()

    async def _end(self) -> None:
        await self._tell("/continue_generation", [server for server in self._paused if server in self._receivers])
        for server in self.servers:
            server.quiet = False
        self._lock.release()

    async def _verify(self) -> None:
        """All servers hold the same weights; those that do not are sent them once more."""
        sums = await self._checksums()
        if len(set(sums.values())) > 1 and self.copy is not None:
            log.warning("the servers' weights differ after publication; sending them once more")
            await self._each(self._resend)
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

        await self._each(ask)
        return sums

    async def _send_tensors(self, bucket: Bucket, version: int | None) -> None:
        payload = await asyncio.to_thread(serialised, bucket)
        tp, timeout = self.config.tp, self.config.load_timeout_s
        await self._each(lambda server: send_tensors(server.client, payload, tp, version, timeout))

    def _broadcast(self, bucket: Bucket, version: int | None) -> None:
        clients = [server.client for server in self._receivers]
        if not clients:
            return
        try:
            if self._group is None or self._group.clients != clients:
                self._regroup(clients, bucket[0][1].device)
            group = self._group
            assert group is not None
            body = group.announce(bucket, version)
            telling = self.call(self._start_telling("/update_weights_from_distributed", body))
            group.broadcast(bucket)
            self.call(_finished(telling))
        except (*FAULTS, RuntimeError) as error:  # torch's errors of a broken group are RuntimeErrors
            self._group = None  # not left in order: a member is missing
            for server in list(self._receivers):
                self._failed(server, error)

    def _regroup(self, clients: list[Any], device: torch.device) -> None:
        """Servers were lost or came back: the group is made anew."""
        if self._group is not None:
            name = self._group.name
            self.call(self._tell("/destroy_weights_update_group", group_name=name))
            self._group.leave()
        self._groups_made += 1
        timeout = self.config.load_timeout_s
        group = Group(f"mel_fast_weights_{self._groups_made}", clients, self.config.tp, device, timeout)
        bodies = {server: group.joining(place) for place, server in enumerate(self._receivers)}
        joining = self.call(self._start_telling("/init_weights_update_group", bodies))
        group.join()
        self.call(_finished(joining))
        self._group = group

    async def _start_telling(self, path: str, body: dict[Any, Any]) -> asyncio.Task[None]:
        """Posts while the caller takes part in what the servers then do. One body for all, or one for each server."""

        async def post(server: Server) -> None:
            own = body.get(server, body)
            await server.client.post(path, self.config.load_timeout_s, **own)

        return asyncio.create_task(self._each(post))

    async def _tell(self, path: str, servers: Sequence[Server] | None = None, **body: object) -> None:
        await self._each(lambda server: server.client.post(path, self.config.load_timeout_s, **body), servers)

    async def _each(
        self, action: Callable[[Server], Coroutine[Any, Any, Any]], servers: Sequence[Server] | None = None
    ) -> None:
        """Does it for every receiver at once. One that fails is no receiver any more."""
        chosen = list(self._receivers if servers is None else servers)
        results = await asyncio.gather(*(action(server) for server in chosen), return_exceptions=True)
        for server, result in zip(chosen, results, strict=True):
            if isinstance(result, FAULTS):
                self._failed(server, result)
            elif isinstance(result, BaseException):
                raise result

    def _failed(self, server: Server, error: BaseException) -> None:
        self._receivers.remove(server)
        server.condemn(f"weights could not be published to it: {error or type(error).__name__}")

    async def _resend(self, server: Server) -> None:
        """The newest weights, from the copy."""
        if self.copy is None or self.copy.path is None:
            raise EngineError(
                f"{server.name} cannot be restored: no copy of the weights is kept (rollout.sglang.recovery_copy="
                "false); resume the run from its newest checkpoint"
            )
        if self.config.weights == "disk":
            await self._update_from(server, str(self.copy.path))
            return
        timeout = self.config.load_timeout_s
        await server.client.post("/begin_weight_update", timeout)
        for bucket, last in buckets(self.copy.read(), self.dtype, self.config.bucket_mib * 2**20):
            payload = await asyncio.to_thread(serialised, bucket)
            await send_tensors(server.client, payload, self.config.tp, self.version if last else None, timeout)
        await server.client.post("/end_weight_update", timeout)

    async def _update_from(self, server: Server, path: str) -> None:
        await send_files(server.client, Path(path), self.version, self.config.load_timeout_s)

    async def _release(self) -> None:
        async with self._lock:
            self._receivers = [server for server in self.servers if server.ready.is_set()]
            for server in self._receivers:
                server.quiet = True
            await self._tell("/release_memory_occupation")
            self.released = True


async def _checksum(server: Server) -> str:
    answer = await server.client.post("/weights_checker", server.config.load_timeout_s, action="checksum")
    return str(answer["per_engine_checksum"])


async def _finished(task: asyncio.Task[None]) -> None:
    await task
