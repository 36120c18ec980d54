"""Worker processes: what hangs, dies or is lost costs its own call, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from pebble import ProcessExpired

from mel_fast.pool import Pool
from mel_fast.verify import _limit_memory


def own_pid() -> int:
    return os.getpid()


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def allocate(mib: int) -> int:
    return len(bytes(mib * 2**20))


def nothing() -> None: ...


@pytest.fixture
def pool() -> Iterator[Pool]:
    one = Pool(1, 5.0, nothing, (), [__name__])
    yield one
    one.close()


def test_a_call_that_hangs_or_kills_its_worker_fails_alone(pool: Pool) -> None:
    async def run() -> list[object]:
        calls = [(time.sleep, 60), (own_pid,), (die, signal.SIGKILL), (own_pid,), (int, "x")]
        return await asyncio.gather(*(pool.run(*call) for call in calls), return_exceptions=True)

    pool.deadline_s = 1.0
    hung, one, died, other, raised = asyncio.run(run())
    assert isinstance(hung, TimeoutError)
    assert isinstance(died, ProcessExpired)
    assert died.exitcode == -signal.SIGKILL
    assert isinstance(raised, ValueError)
    assert isinstance(one, int)
    assert isinstance(other, int)
    assert one != other


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_pool_that_loses_its_workers_is_replaced(pool: Pool, blow: signal.Signals) -> None:
    pool.stall_s = 2.0
    first = asyncio.run(pool.run(own_pid))
    os.kill(first, blow)
    time.sleep(0.5)
    assert asyncio.run(pool.run(own_pid)) != first


def test_event_loops_of_several_threads_share_the_workers(pool: Pool) -> None:
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(asyncio.run(pool.run(own_pid)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_no_worker_is_left_behind(pool: Pool) -> None:
    async def leave() -> int:
        pid = await pool.run(own_pid)
        hanging = asyncio.create_task(pool.run(time.sleep, 60))
        await asyncio.sleep(0.5)
        hanging.cancel()
        return pid

    pid = asyncio.run(leave())
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_s_memory_can_be_limited() -> None:
    limited = Pool(1, 20.0, _limit_memory, (64,), [__name__])
    try:
        assert asyncio.run(limited.run(allocate, 16)) == 16 * 2**20
        with pytest.raises(MemoryError):
            asyncio.run(limited.run(allocate, 256))
    finally:
        limited.close()
