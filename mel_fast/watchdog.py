"""Ends a rank that hangs, and says where everybody was.

A thread of each rank knows which phase its rank is in, and since when. When a phase outlasts its limit, the thread
prints who is where, writes the stacks of all threads to standard error and RUN/stacks/rank_N.txt, and ends the process
with status 1, so that torchrun starts all ranks again. The ranks tell each other where they are, once a second, through
the store of torchrun's agent. Those that torchrun then ends by SIGTERM leave their stacks as well.

Where C code keeps the interpreter to itself, no Python thread can run. A timer of faulthandler's, which needs no
interpreter, then ends the process GRACE_S later, without words, but with the stacks.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistError

from mel_fast.distributed import World
from mel_fast.elastic import connect

if TYPE_CHECKING:
    from mel_fast.config import RunConfig

BEAT_S = 1.0
GRACE_S = 30.0
TOGETHER = ("update", "publish", "checkpoint", "export")  # what all ranks do side by side, and rank 0 waits for them
NOWHERE = "between phases"
SHOWN = 8  # other ranks in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    phase: str
    done: int  # finished steps
    since: float  # on time.monotonic of that rank

    def __str__(self) -> str:
        where = self.phase if self.phase == NOWHERE else f"in '{self.phase}'"
        return f"{where} after {self.done} finished steps"


class Watchdog:
    """Use it as a context manager, in the thread that does the work.

    Args:
        world: the ranks to tell, and to hear from.
        limits: `phase_timeout_minutes` holds for what all ranks do together, `collective_timeout_minutes` for the rest.
    """

    def __init__(self, world: World, limits: RunConfig) -> None:
        self.world, self.limits = world, limits
        store = connect() if world.size > 1 else None  # a connection of its own: the other one may be in use for long
        self._store: Store | None = PrefixStore(f"{world.attempt}/places", store) if store is not None else None
        self._beats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._path: Path | None = None
        self._file = 2  # standard error
        self._place = Place("setup", 0, time.monotonic())

    def __enter__(self) -> Self:
        self._enter(self._place.phase, 0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGTERM)
        if self._path is not None:
            os.close(self._file)
            if self._path.stat().st_size == 0:
                self._path.unlink()

    def write_to(self, folder: Path) -> None:
        """Stacks go to `folder/rank_N.txt` from now on, behind what an earlier attempt has left there."""
        folder.mkdir(exist_ok=True)
        self._path = folder / f"rank_{self.world.rank}.txt"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faulthandler.register(signal.SIGTERM, file=self._file, all_threads=True, chain=True)
        self._enter(self._place.phase, self._place.done)

    @contextmanager
    def phase(self, name: str, done: int) -> Iterator[None]:
        """What runs inside is the phase of this name, after so many finished steps."""
        self._enter(name, done)
        try:
            yield
        finally:
            self._enter(NOWHERE, done)

    def _enter(self, phase: str, done: int) -> None:
        self._place = Place(phase, done, time.monotonic())
        faulthandler.dump_traceback_later(60 * self._limit(phase)[0] + GRACE_S, exit=True, file=self._file)

    def _limit(self, phase: str) -> tuple[float, str]:
        """In minutes, and the setting it comes from."""
        name = "phase_timeout_minutes" if phase in TOGETHER else "collective_timeout_minutes"
        return getattr(self.limits, name), f"run.{name}"

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            place = self._place
            self._tell(place)
            if time.monotonic() - place.since > 60 * self._limit(place.phase)[0]:
                others = self._others(place)
                if self._place is place:  # not even now has it moved on
                    self._end(place, others)

    def _tell(self, place: Place) -> None:
        """A sign of life: the count of beats, which no clock has to agree on."""
        self._beats += 1
        seconds = time.monotonic() - place.since
        if self._store is not None:
            try:
                self._store.set(str(self.world.rank), json.dumps([self._beats, place.phase, place.done, seconds]))
            except DistError as error:
                log.warning("rank %d: the store of torchrun is gone (%s)", self.world.rank, error)
                self._store = None

    def _others(self, here: Place) -> list[str]:
        """Which other ranks are not where this one is, in words."""
        before = self._heard()
        for _ in range(3):
            self._closed.wait(BEAT_S)
            self._tell(here)
        after, found, absent = self._heard(), list[str](), list[str]()
        for rank, (beats, phase, done, seconds) in after.items():
            place = Place(phase, done, 0.0)
            if beats == before.get(rank, (None,))[0]:
                found.append(f"rank {rank} gives no sign of life, it was last seen {place}")
            elif (phase, done) != (here.phase, here.done):
                found.append(f"rank {rank} did not arrive, it is {place} for {seconds:.0f} s")
        absent = [str(r) for r in range(self.world.size) if r not in after and r != self.world.rank]
        return found + ([f"nothing is known of rank {', '.join(absent)}"] if absent else [])

    def _heard(self) -> dict[int, tuple[int, str, int, float]]:
        """The last sign of life of each other rank."""
        heard: dict[int, tuple[int, str, int, float]] = {}
        if self._store is None:
            return heard
        for rank in range(self.world.size):
            if rank != self.world.rank and self._store.check([str(rank)]):
                heard[rank] = tuple(json.loads(self._store.get(str(rank))))
        return heard

    def _end(self, place: Place, others: list[str]) -> NoReturn:
        minutes, setting = self._limit(place.phase)
        more = [f"and {len(others) - SHOWN} more ranks"] if len(others) > SHOWN else []
        alone = ["the other ranks are there, too"] if self.world.size > 1 else []
        late = f"rank {self.world.rank} is {place} for longer than {setting}={minutes:g}"
        message = "; ".join([f"error: {late}", *(others[:SHOWN] or alone), *more])
        kept = f"; stacks of all threads are in {self._path}" if self._path is not None else ""
        print(message + kept, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)
        if self._path is not None:
            os.write(self._file, f"{message}\n".encode())
            faulthandler.dump_traceback(file=self._file, all_threads=True)
        os._exit(1)  # the main thread cannot be asked to leave
