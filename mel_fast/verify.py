"""Verification: a response becomes a score, by Math-Verify or by a reward function of the user's own.

What a response states as its answer is looked for at once, in process, and so are plain integers decided
(`answers.same_integer`). Everything else goes to worker processes (pool.py) with a deadline per answer: of processor
time for Math-Verify, so that verdicts do not depend on how busy the machine is; by the clock for a function, which may
wait for something. An answer that hangs or kills its worker scores 0 and says why, and everything else goes on.

Nor does it wait: Math-Verify needs milliseconds, so an answer that takes more than PATIENCE_S makes room for the next
one and is tried again by other workers, with the whole deadline and low priority.

A reward function is named by its import path, `verify.function=my_rewards:score`:

    def score(response: str, answer: str, prompt: Prompt) -> float: ...

An exception in it stops the run: a bug in a reward is not a zero.
"""

from __future__ import annotations

import asyncio
import difflib
import gc
import importlib
import inspect
import math
import os
import resource
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from pebble import ProcessExpired
from pydantic import BaseModel, ConfigDict, Field

from mel_fast import answers
from mel_fast.answers import Reason
from mel_fast.pool import Pool
from mel_fast.types import Prompt

Outcome = tuple[float, Reason]
RewardFunction = Callable[[str, str, Prompt], float]

PATIENCE_S = 0.2  # of processor time: several times what the slowest ordinary answers were seen to need
MOST_KNOWN = 20_000  # verdicts that are remembered


class VerifyConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(default=2, ge=1, description="processes; as many again for answers that take long")
    timeout_s: float = Field(
        default=5.0,
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
    """Scores responses. Workers start with the first answer that needs them; `close` (or `with`) ends them."""

    def __init__(self, config: VerifyConfig | None = None) -> None:
        self.config = config = config or VerifyConfig()
        self._known: dict[tuple[str, str], Outcome] = {}  # the samples of a prompt often state the same answer
        if config.function is not None:
            load_function(config.function)  # a wrong import path is told now, not after the first rollout
            self._pools = [Pool(config.workers, config.timeout_s, _prepare_function, (config.function,), [__name__])]
            return
        preload = [__name__, "mel_fast.warm"]
        self._pools = [  # a worker keeps to its deadline itself, if it gets a twentieth of a processor or more
            Pool(config.workers, 20 * self._deadline_s(patient), _prepare, (config.memory_mib, patient), preload)
            for patient in (False, True)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for pool in self._pools:
            pool.close()

    async def score(self, response: str, answer: str, prompt: Prompt) -> Verdict:
        config = self.config
        if config.function is not None:
            score, reason = await _run(self._pools[0], _call_function, config.function, response, answer, prompt)
        else:
            found, reason = answers.stated(response, config.max_chars, config.anywhere)
            if reason:
                score = 0.0
            elif (same := answers.same_integer(found, answer)) is not None:
                score = float(same)
            else:
                score, reason = await self._compare(found, answer)
        return Verdict(score, score >= config.correct_at and not reason, reason)

    def score_many(self, items: Iterable[tuple[str, str, Prompt]]) -> list[Verdict]:
        """`score` for many at once, in order, from code that is not asynchronous."""

        async def gather() -> list[Verdict]:
            return await asyncio.gather(*(self.score(*item) for item in items))

        return asyncio.run(gather())

    async def _compare(self, found: str, gold: str) -> Outcome:
        outcome = self._known.get((found, gold))
        if outcome is None:
            outcome = await _run(self._pools[0], _compare, found, gold, self._deadline_s(patient=False))
            if outcome[1] == "timeout":
                outcome = await _run(self._pools[1], _compare, found, gold, self._deadline_s(patient=True))
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[found, gold] = outcome
        return outcome

    def _deadline_s(self, patient: bool) -> float:
        return self.config.timeout_s if patient else min(PATIENCE_S, self.config.timeout_s)


async def _run(pool: Pool, function: Callable[..., Outcome], *args: object) -> Outcome:
    try:
        return await pool.run(function, *args)
    except TimeoutError:
        return 0.0, "timeout"
    except ProcessExpired as death:
        return 0.0, "timeout" if death.exitcode == -signal.SIGPROF else "crash"


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
    except (MemoryError, RecursionError):
        return 0.0, "crash"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if _memory() > 64 * 2**20 + _memory_at_start:
            # It keeps the largest numbers, and the next answer needs room.
            importlib.import_module("sympy.core.cache").clear_cache()


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


def _prepare(memory_mib: int, patient: bool) -> None:
    """First thing in a worker for Math-Verify."""
    importlib.import_module("mel_fast.warm")
    gc.freeze()  # else the first full collection copies all memory shared with the server, for longer than PATIENCE_S
    _limit_memory(memory_mib)
    if patient:
        os.nice(10)


def _prepare_function(path: str) -> None:
    _cached_function(path)


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
