"""Verification: a response becomes a score, by Math-Verify or by a reward function of the user's own.

The comparison runs in a pool of worker processes with a deadline per answer: of processor time for Math-Verify, so that
verdicts do not depend on how busy the machine is; by the clock for a function, which may wait for something. A worker
that hangs is killed, one that hung or died is replaced; the answer at hand scores 0 and says why, and everything else
goes on. What a response states as its answer is looked for at once, in process, and so are plain integers decided
(`answers.same_integer`).

A reward function is named by its import path, `verify.function=my_rewards:score`:

    def score(response: str, answer: str, prompt: Prompt) -> float: ...

An exception in it stops the run: a bug in a reward is not a zero.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import logging
import math
import multiprocessing
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from pebble import ProcessExpired, ProcessPool
from pydantic import BaseModel, ConfigDict, Field

from mel_fast import answers
from mel_fast.answers import Reason
from mel_fast.types import Prompt

Outcome = tuple[float, Reason]
RewardFunction = Callable[[str, str, Prompt], float]

log = logging.getLogger(__name__)


class VerifyConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(default=2, ge=1, description="processes")
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="deadline for one answer, in seconds of a worker's processor time; with `function` by the clock",
    )
    function: str | None = Field(default=None, description='reward function as "module:function"; null: Math-Verify')
    correct_at: float = Field(default=1.0, description="reward from which a response counts as right")
    max_chars: int = Field(default=2_000, ge=100, description="Math-Verify: the longest answer; a longer one is wrong")
    anywhere: bool = Field(
        default=False,
        description="Math-Verify: also take an answer that is neither boxed nor on a last line `Answer: ...`: the last "
        "mathematics of the text, be it a guess or cut off",
    )
    memory_mib: int = Field(
        default=1024, ge=64, description="Math-Verify: how much a worker may grow (Linux); what needs more scores 0"
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    score: float
    correct: bool
    reason: Reason


class RewardError(RuntimeError):
    """The user's reward function raised, or returned something that is not a finite number."""


class Verifier:
    """Scores responses. The pool starts with the first answer that needs it; `close` (or `with`) ends it."""

    def __init__(self, config: VerifyConfig | None = None) -> None:
        self.config = config or VerifyConfig()
        if self.config.function is not None:
            load_function(self.config.function)  # a wrong import path is told now, not after the first rollout
        self._pool: ProcessPool | None = None
        self._starting = threading.Lock()  # an evaluation and the next step's rollouts may score at once
        self._progress = 0.0  # when any answer last came back
        # By the clock. A worker keeps to Math-Verify's deadline itself, if it gets a tenth of a processor or more.
        self._deadline_s = self.config.timeout_s * (10 if self.config.function is None else 1)
        # A busy pool returns something every `_deadline_s`; the rest is room for a slow start.
        self._stall_s = 2 * self._deadline_s + 60.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            _end(pool)

    async def score(self, response: str, answer: str, prompt: Prompt) -> Verdict:
        config = self.config
        if config.function is not None:
            score, reason = await self._in_pool(_call_function, config.function, response, answer, prompt)
        else:
            found, reason = answers.stated(response, config.max_chars, config.anywhere)
            if reason:
                score = 0.0
            elif (same := answers.same_integer(found, answer)) is not None:
                score = float(same)
            else:
                score, reason = await self._in_pool(_compare, found, answer, config.timeout_s)
        return Verdict(score, score >= config.correct_at and not reason, reason)

    def score_many(self, items: Iterable[tuple[str, str, Prompt]]) -> list[Verdict]:
        """`score` for many at once, in order, from code that is not asynchronous."""

        async def gather() -> list[Verdict]:
            return await asyncio.gather(*(self.score(*item) for item in items))

        return asyncio.run(gather())

    async def _in_pool(self, function: Callable[..., Outcome], *args: object) -> Outcome:
        for _ in range(2):
            with self._starting:
                pool = self._pool = self._pool or _start(self.config)
            try:
                return await self._wait(pool, _schedule(pool, function, args, self._deadline_s))
            except TimeoutError:
                return 0.0, "timeout"
            except ProcessExpired as death:
                return 0.0, "timeout" if death.exitcode == -signal.SIGPROF else "crash"
            except BrokenProcessPool as error:
                if self._pool is pool:  # the first to notice replaces it
                    self._pool = None
                    log.warning("verifier: the worker pool broke (%s); starting another", error)
                    await asyncio.to_thread(_end, pool)
        raise RuntimeError("verifier: the worker pool broke twice over one answer; see the workers' messages above")

    async def _wait(self, pool: ProcessPool, future: Future[Outcome]) -> Outcome:
        answer = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait({answer}, timeout=self._stall_s))[0]:
                # A pool can lose its workers without failing its answers. The run must not wait for ever.
                if self._pool is not pool or time.monotonic() - self._progress > self._stall_s:
                    raise BrokenProcessPool(f"no worker answered for {self._stall_s:.0f} s")
        finally:
            answer.cancel()  # without effect once it is done
        self._progress = time.monotonic()
        if answer.cancelled():
            raise BrokenProcessPool("the pool ended before its answers came")
        return answer.result()


def load_function(path: str) -> RewardFunction:
    """Import "module:function", or say what is wrong with it."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f'verify.function {path!r}: write it as "module:function"')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        hint = "is its directory on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else "importing it failed."
        raise ValueError(f"verify.function {path!r}: {type(error).__name__}: {error}; {hint}") from error
    function: Any = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, vars(module), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"verify.function {path!r}: {module_name} has no {name!r}{meant}")
    try:
        inspect.signature(function).bind("response", "answer", "prompt")
    except TypeError as error:
        raise ValueError(
            f"verify.function {path!r} cannot be called with (response, answer, prompt): {error}"
        ) from error
    return function


_cached_function = cache(load_function)


def _compare(found: str, gold: str, timeout_s: float) -> Outcome:
    signal.setitimer(signal.ITIMER_PROF, timeout_s)  # its signal ends the process, also in the middle of a sum in C
    try:
        return answers.compare(found, gold)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if _memory() > 64 * 2**20 + _memory_at_start:
            importlib.import_module(
                "sympy.core.cache"
            ).clear_cache()  # it keeps the largest numbers, and the next answer needs room


def _call_function(path: str, response: str, answer: str, prompt: Prompt) -> Outcome:
    try:
        score: Any = _cached_function(path)(response, answer, prompt)
        if isinstance(score, str | bytes):  # float() would take "0.5"
            raise TypeError(f"it returned {score!r}, not a number")
        score = float(score)
    except (
        BaseException
    ) as error:  # SystemExit and KeyboardInterrupt too: in the trainer they would mean something else
        # In an exception of our own, as not every exception survives the way back to the trainer's process.
        raise RewardError(f"{path} failed on prompt {prompt.id!r}: {type(error).__name__}: {error}") from error
    if not math.isfinite(score):
        raise RewardError(f"{path} returned {score} for prompt {prompt.id!r}; a reward must be a finite number")
    return score, ""


def _schedule(pool: ProcessPool, function: Callable[..., Outcome], args: tuple[object, ...], timeout_s: float) -> Any:
    try:
        return pool.schedule(function, args=args, timeout=timeout_s)
    except RuntimeError as error:  # pebble's word for a pool that is no longer active
        raise BrokenProcessPool(str(error)) from error


def _start(config: VerifyConfig) -> ProcessPool:
    # forkserver: the trainer's process has threads and a device, so it cannot be forked; and a replacement for a killed
    # worker is there in milliseconds, because the server has already imported what workers need. That includes what
    # the main program imports, because multiprocessing runs its module again in every worker.
    context: Any = multiprocessing.get_context("forkserver")
    main = getattr(sys.modules["__main__"], "__spec__", None)
    programme: list[str] = []
    if main is not None and not main.name.endswith("__main__"):  # started with `python -m package.module`
        package = main.name.partition(".")[0]
        programme = sorted(name for name in sys.modules if name.startswith(package + ".") and name != main.name)
    warm = ["mel_fast.warm"] if config.function is None else []
    context.set_forkserver_preload([__name__, *warm, *programme])
    return ProcessPool(
        config.workers, initializer=_warm_up, initargs=(config.function, config.memory_mib), context=context
    )


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _warm_up(function: str | None, memory_mib: int = 1024) -> None:
    """First thing in a worker, before any deadline runs."""
    # At once, also in the middle of a sum in C. With pebble's handler that waits, and all workers wait with it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if function is None:
        importlib.import_module("mel_fast.warm")
        _limit_memory(memory_mib)
    else:
        _cached_function(function)


def _limit_memory(growth_mib: int) -> None:
    """An answer such as 9^{9^{9}} must not take the machine's memory, and the trainer with it."""
    global _memory_at_start
    _memory_at_start = _memory()
    if _memory_at_start:
        most = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = _memory_at_start + growth_mib * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _memory() -> int:
    """Bytes of this process's data, as RLIMIT_DATA counts them; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[5]) * resource.getpagesize() if statm.exists() else 0


_memory_at_start = 0  # of a worker
