"""Weights through a process group of the trainer and the servers: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.receivers import FAULTS, Receivers
from mel_fast.rollout.sglang.server import Server
from mel_fast.rollout.sglang.transport import Bucket

log = logging.getLogger(__name__)
JOIN = timedelta(seconds=60)  # the longest wait for servers that were all there a moment ago


class GroupSender:
    """Keeps a group with those who receive, and makes it anew when servers were lost or came back.

    Args:
        tp: ranks of each server.
        call: runs a coroutine in the engine's event loop and waits for its result.
    """

    def __init__(self, tp: int, call: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.tp, self.call = tp, call
        self._group: Group | None = None
        self._members: list[tuple[str, int]] = []  # servers as they were when the group was made

    def send(self, receivers: Receivers, bucket: Bucket, version: int | None) -> None:
        """Called outside of the engine's loop. `version` goes with the last bucket, which also flushes the caches.

        A server that is lost breaks the group for all: then all are failed.
        """
        members = [(server.name, server.openings) for server in receivers]
        if members and (self._group is None or self._members != members):
            self._regroup(receivers, bucket[0][1].device)
            self._members = members
        group = self._group
        if not len(receivers) or group is None:
            return
        body = group.announce(bucket, version)
        self._together(
            receivers,
            "/update_weights_from_distributed",
            lambda server: body,
            lambda refused: group.broadcast(bucket, refused),
        )

    def leave(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None

    def close(self, attached: Iterable[Server]) -> None:
        """Ends the group, also on servers that outlive this run."""
        if self._group is not None:
            self.call(self._forget(Receivers(attached, 10), self._group.name))
            self.leave()

    def _regroup(self, receivers: Receivers, device: torch.device) -> None:
        if self._group is not None:
            self.call(self._forget(receivers, self._group.name))
            self.leave()
        servers = list(receivers)
        urls = [server.client.url for server in servers]
        self._group = group = Group(f"mel_fast-{uuid.uuid4().hex}", urls, self.tp, device, receivers.timeout_s)
        bodies = {server: group.joining(place) for place, server in enumerate(servers)}
        self._together(receivers, "/init_weights_update_group", bodies.__getitem__, group.join)

    def _together(
        self,
        receivers: Receivers,
        path: str,
        body: Callable[[Server], dict[str, object]],
        take_part: Callable[[threading.Event], None],
    ) -> None:
        """Posts, and takes part in what the servers then do. It is told by an event when one of them fails."""
        refused = threading.Event()

        async def post(server: Server) -> None:
            try:
                await server.client.post(path, receivers.timeout_s, **body(server))
            except BaseException:
                refused.set()
                raise

        async def start() -> asyncio.Task[None]:
            return asyncio.create_task(receivers.each(post))

        task = self.call(start())
        if fault := _fault(take_part, refused):
            log.warning("the group that weights are sent through broke: %s", fault)
            self.leave()
            self.call(receivers.all_failed(EngineError(fault)))
        self.call(_finished(task))

    async def _forget(self, receivers: Receivers, name: str) -> None:
        async def forget(server: Server) -> None:
            with suppress(EngineError):  # one that was restarted does not know the group, and says so
                await server.client.post("/destroy_weights_update_group", receivers.timeout_s, group_name=name)

        await receivers.each(forget)


class Group:
    """A process group of the trainer's rank 0 and all ranks of the servers, for weights alone.

    Args:
        name: unique among all runs that the servers see.
        urls: of the servers.
        tp: ranks of each server.
        device: of the weights: NCCL for CUDA, gloo for a CPU.
    """

    def __init__(self, name: str, urls: list[str], tp: int, device: torch.device, timeout_s: float) -> None:
        self.name, self.tp = name, tp
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.timeout = timedelta(seconds=timeout_s)
        self.world_size = 1 + tp * len(urls)
        self.address = _own_address(urls[0])
        listening = socket.create_server((self.address, 0))  # there alone, not on every interface as by default
        port = listening.getsockname()[1]
        self.store = TCPStore(
            self.address,
            port,
            self.world_size,
            is_master=True,
            timeout=JOIN,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        self.group: Any = None

    def joining(self, place: int) -> dict[str, object]:
        """What the server at this place of `urls` is told at /init_weights_update_group."""
        return {
            "master_address": self.address,
            "master_port": self.store.port,
            "rank_offset": 1 + self.tp * place,
            "world_size": self.world_size,
            "group_name": self.name,
            "backend": self.backend,
        }

    def join(self, refused: threading.Event) -> None:
        """Blocks until the servers have joined. Raises EngineError when `refused` is set before."""
        joined: Future[None] = Future()

        def join() -> None:
            try:
                joined.set_result(self._join())
            except Exception as error:
                joined.set_exception(error)

        # Joining cannot be broken off. The thread of one that is given up ends after `JOIN`.
        threading.Thread(target=join, name=self.name, daemon=True).start()
        while not wait([joined], timeout=0.02).done:
            if refused.is_set():
                raise EngineError("a server did not join")
        joined.result()

    def _join(self) -> None:
        # torch's public constructors register a group with the default world, to which the servers do not belong;
        # every trainer that talks to inference servers uses this helper, and the servers use it themselves.
        from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

        self.group, _ = _new_process_group_helper(
            self.world_size,
            0,
            [],
            Backend(self.backend),
            PrefixStore(self.name, self.store),
            group_name=self.name,  # pyright: ignore[reportArgumentType]  # a NewType of str
            timeout=self.timeout,
        )
        _world.pg_group_ranks[self.group] = {rank: rank for rank in range(self.world_size)}

    def broadcast(self, bucket: Bucket, refused: threading.Event) -> None:
        """Raises EngineError when `refused` is set meanwhile, RuntimeError when a member is lost."""
        works = [dist.broadcast(tensor, src=0, group=self.group, async_op=True) for _, tensor in bucket]
        for work in works:
            assert work is not None
            while not work.is_completed():  # not `wait`: a server that does not take part would block us for long
                if refused.wait(0.001):
                    raise EngineError("a server did not take part")
            work.wait()

    def announce(self, bucket: Bucket, version: int | None) -> dict[str, object]:
        """The body of /update_weights_from_distributed that goes with `broadcast`."""
        last: dict[str, object] = {} if version is None else {"weight_version": str(version)}
        return {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self.name,
            "flush_cache": version is not None,
        } | last

    def leave(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def _own_address(url: str) -> str:
    """Our address as a server at `url` sees it."""
    there = urlsplit(url)
    address = (there.hostname or "", there.port or {"http": 80, "https": 443}[there.scheme])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: it only looks the route up
        return probe.getsockname()[0]


async def _finished(task: asyncio.Task[None]) -> None:
    await task


def _fault(take_part: Callable[[threading.Event], None], refused: threading.Event) -> str:
    """What goes wrong, in words: an exception's traceback would keep the group alive, and with it its connections, by
    whose end the other members notice."""
    try:
        take_part(refused)
    except (*FAULTS, RuntimeError) as error:  # torch's errors of a broken group are RuntimeErrors
        return str(error).splitlines()[0][:300] or type(error).__name__
    return ""
