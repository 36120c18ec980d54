"""The world of ranks, as torchrun makes it; without torchrun, a world of one."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from mel_fast.elastic import lasting_store, meet
from mel_fast.errors import InputError, OutputError


@dataclass(frozen=True, slots=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    device: torch.device
    attempt: str = ""  # of torchrun to run this world, see elastic.meet

    @property
    def main(self) -> bool:
        return self.rank == 0

    def scatter(self, shares: Sequence[Any] | None) -> Any:
        """Gives each rank its share of what rank 0 passes (one object per rank; other ranks pass None)."""
        if self.size == 1:
            assert shares is not None
            return shares[0]
        received: list[Any] = [None]
        dist.scatter_object_list(received, list(shares) if shares is not None else None, src=0, group=_object_group)
        return received[0]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_object_group)
        return box[0]

    def reduce(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Adds scalars over ranks; those whose name ends in `max` are maximised. Every rank passes the same names."""
        names = sorted(metrics)
        result: dict[str, float] = {}
        for ending, operation in ((False, dist.ReduceOp.SUM), (True, dist.ReduceOp.MAX)):
            chosen = [name for name in names if name.endswith("max") == ending]
            if not chosen:
                continue
            values = torch.stack([metrics[name].detach().to(self.device, torch.float64) for name in chosen])
            if ending:  # a NaN of one rank may be lost among numbers when they are maximised; infinity is not
                values = values.masked_fill(values.isnan(), torch.inf)
            if self.size > 1:
                dist.all_reduce(values, op=operation)
            result.update(zip(chosen, values.tolist(), strict=True))
        return result

    def add(self, values: torch.Tensor) -> list[float]:
        """Adds a vector over ranks, in place. Every rank passes as many values and gets the same sums."""
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        received: list[Any] = [None] * self.size
        dist.all_gather_object(received, value, group=_object_group)
        return received

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside with an OutputError or OSError on one rank, fails on all with an OutputError. Collective.

        Nothing inside may be collective itself.
        """
        failure = None
        try:
            yield
        except (OutputError, OSError) as error:
            failure = str(error)
        if failures := [failure for failure in self.gather(failure) if failure]:
            raise OutputError(failures[0])

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str, timeout_minutes: float) -> Iterator[World]:
    """Joins the process group that torchrun announces in the environment, and leaves it at the end.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout_minutes: how long a rank waits in a collective. Ranks other than 0 wait there while rank 0
            collects rollouts.

    Raises:
        InputError: `cuda` was asked for and there is none.
        LaunchError: a rank did not start.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("run.device=cuda, but torch sees no CUDA device; use run.device=auto or cpu")
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    attempt, meeting = "", {}
    if (store := lasting_store()) is not None:
        attempt = meet(store, rank, size)
        meeting = {"store": PrefixStore(attempt, store), "rank": rank, "world_size": size}
    elif "RANK" not in os.environ:  # a group of one, so that FSDP2 and checkpoints work the same way
        meeting = {"store": HashStore(), "rank": 0, "world_size": 1}
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, **meeting)
    global _object_group
    _object_group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=timeout)) if on_gpu else None
    try:
        yield World(rank, size, place, attempt)
        dist.barrier()
    finally:
        _object_group = None
        dist.destroy_process_group()


def leave() -> None:
    """The last thing a rank does. What is sharded refers to the process group, in cycles; a group that is still
    referred to when the interpreter ends may abort the process (its threads are never joined)."""
    gc.collect()


_object_group: dist.ProcessGroup | None = None  # None: the default group
"""Python objects travel over gloo: NCCL would copy them through GPU memory."""
