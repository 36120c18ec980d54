"""Worker processes that answer calls, each by a deadline: pebble's pool, and what it lacks.

A worker that hangs is killed, one that hung or died is replaced, and only its own call fails. Pebble does that, but a
worker that is stopped, or killed while it waits for work, can leave a pool that answers nothing and says nothing: that
is noticed here, the pool is replaced and its calls are made again.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any, TypeVar

from pebble import ProcessPool

T = TypeVar("T")

log = logging.getLogger(__name__)


class Pool:
    """Starts with the first call. May be used from several threads and event loops at once.

    Args:
        workers: processes.
        deadline_s: for one call, by the clock.
        prepare: called with `arguments`, first thing in each worker and before any deadline runs.
        preload: modules that workers are born with.
    """

    def __init__(
        self,
        workers: int,
        deadline_s: float,
        prepare: Callable[..., None],
        arguments: tuple[object, ...],
        preload: list[str],
    ) -> None:
        self.workers, self.deadline_s = workers, deadline_s
        self._prepare, self._preload = (prepare, *arguments), preload
        self._pool: ProcessPool | None = None
        self._starting = threading.Lock()
        self._progress = 0.0  # when any answer last came back
        # A busy pool returns something every `deadline_s`; the rest is room for a slow start.
        self.stall_s = 2 * deadline_s + 60.0

    def close(self) -> None:
        """Ends the workers, also those at work."""
        pool, self._pool = self._pool, None
        if pool is not None:
            _end(pool)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """What `function(*args)` returns or raises in a worker.

        Raises:
            TimeoutError: it took longer than the deadline; its worker was killed.
            pebble.ProcessExpired: its worker died; `exitcode` says of what.
            RuntimeError: two pools in succession answered nothing.
        """
        for _ in range(2):
            with self._starting:
                pool = self._pool = self._pool or self._start()
            try:
                return await self._wait(pool, _schedule(pool, function, args, self.deadline_s))
            except BrokenProcessPool as error:
                if self._pool is pool:  # the first to notice replaces it
                    self._pool = None
                    log.warning("the pool of worker processes broke (%s); starting another", error)
                    await asyncio.to_thread(_end, pool)
        raise RuntimeError("the pool of worker processes broke twice over one call; see the workers' messages above")

    async def _wait(self, pool: ProcessPool, future: Future[Any]) -> Any:
        answer = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait({answer}, timeout=self.stall_s))[0]:
                # A pool can lose its workers without failing its calls. The run must not wait for ever.
                if self._pool is not pool or time.monotonic() - self._progress > self.stall_s:
                    raise BrokenProcessPool(f"no worker answered for {self.stall_s:.0f} s")
        finally:
            answer.cancel()  # without effect once it is done
        self._progress = time.monotonic()
        if answer.cancelled():
            raise BrokenProcessPool("the pool ended before its answers came")
        return answer.result()

    def _start(self) -> ProcessPool:
        # forkserver: the trainer's process has threads and a device, so it cannot be forked; and a replacement for a
        # killed worker is there in milliseconds, because the server has already imported what workers need. That
        # includes what the main program imports, because multiprocessing runs its module again in every worker.
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*self._preload, *_imported_by(sys.modules["__main__"])])
        return ProcessPool(self.workers, initializer=_first, initargs=self._prepare, context=context)


def _imported_by(main: ModuleType) -> list[str]:
    """Modules that are, or that define, what the program's names stand for."""
    values = vars(main).values()
    names = {v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None) for v in values}
    return sorted(name for name in names if isinstance(name, str) and name in sys.modules and name != "__main__")


def _schedule(pool: ProcessPool, function: Callable[..., Any], args: tuple[object, ...], deadline_s: float) -> Any:
    try:
        return pool.schedule(function, args=args, timeout=deadline_s)
    except RuntimeError as error:  # pebble's word for a pool that is no longer active
        raise BrokenProcessPool(str(error)) from error


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _first(prepare: Callable[..., None], *arguments: object) -> None:
    # At once, also in the middle of a sum in C. With pebble's handler that waits, and all workers wait with it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    prepare(*arguments)
