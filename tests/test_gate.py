"""The prefix gate before a simulated server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from radix_server import RadixServer, settle

from mel_fast.rollout.prefixes import as_bytes, shareable_tokens
from mel_fast.rollout.sglang.gate import PrefixGate

PATIENT = 1e9  # seconds


async def send(gate: PrefixGate, server: RadixServer, prompt: list[int]) -> int:
    async with gate.admitted(as_bytes(prompt)) as prefilled:
        cached = await server.prefill(prompt)
        prefilled(cached)
    return cached


def starting(gate: PrefixGate, server: RadixServer, *prompts: list[int]) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(send(gate, server, prompt)) for prompt in prompts]


def run_all(prompts: Sequence[list[int]], arrivals: Sequence[int], min_tokens: int = 1) -> RadixServer:
    """Prompt i arrives before step arrivals[i]."""

    async def run() -> RadixServer:
        gate, server = PrefixGate(PATIENT, min_tokens), RadixServer()
        tasks: list[asyncio.Task[int]] = []
        step = 0
        while step <= max(arrivals, default=0) or not all(task.done() for task in tasks):
            here = [prompt for prompt, arrival in zip(prompts, arrivals, strict=True) if arrival == step]
            tasks += starting(gate, server, *here)
            await settle()
            server.step()
            await settle()
            step += 1
        await asyncio.gather(*tasks)
        assert gate.impatient == 0
        return server

    return asyncio.run(run())


def best(prompts: Sequence[list[int]]) -> int:
    return shareable_tokens([as_bytes(prompt) for prompt in prompts])


def reflections(queries: int, wrongs: int, rights: int, length: int = 10) -> list[list[int]]:
    """Instruction, question, wrong and right solution, each of `length` tokens."""
    prompts: list[list[int]] = []
    for q in range(queries):
        for w in range(wrongs):
            for r in range(rights):
                prompts.append(
                    [i for first in (1, 1000 + q, 2000 + w, 3000 + r) for i in [first, *range(2, length + 1)]]
                )
    return prompts


# --- what is shared ---------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=14), st.data())
def test_everything_that_can_be_shared_is_whatever_arrives_when(prompts: list[list[int]], data: Any) -> None:
    prompts = [[*prompt, 9] for prompt in prompts]  # no prompt is the beginning of another
    arrivals = [data.draw(st.integers(0, 4)) for _ in prompts]
    server = run_all(prompts, arrivals)
    answered = [prompt for batch in server.batches for prompt, _ in batch]
    assert sorted(answered) == sorted(prompts)
    assert server.saved() == best(prompts)


def test_without_the_gate_a_cold_batch_shares_nothing() -> None:
    """What the gate is for, and that the simulated server shows it."""

    async def run() -> RadixServer:
        server = RadixServer()
        tasks = [asyncio.create_task(server.prefill(prompt)) for prompt in reflections(2, 2, 2)]
        await settle()
        server.step()
        await asyncio.gather(*tasks)
        return server

    assert asyncio.run(run()).saved() == 0


def test_reflections_go_in_four_waves_however_many_there_are() -> None:
    prompts = reflections(queries=5, wrongs=3, rights=2)
    server = run_all(prompts, [0] * len(prompts))
    assert server.saved() == best(prompts)
    assert len(server.batches) == 4


def test_rollouts_of_a_prompt_wait_for_the_first_alone() -> None:
    server = run_all([[1, 2, 3, 4]] * 8, [0] * 8)
    assert [[cached for _, cached in batch] for batch in server.batches] == [[0], [3] * 7]


def test_what_shares_nothing_does_not_wait() -> None:
    server = run_all([[i, 1, 2, 3] for i in range(10)], [0] * 10)
    assert len(server.batches) == 1


def test_few_tokens_are_not_waited_for() -> None:
    prompts = [[*range(7), i, i + 1] for i in range(100, 103)]
    assert len(run_all(prompts, [0] * 3, min_tokens=8).batches) == 1
    assert len(run_all(prompts, [0] * 3, min_tokens=7).batches) == 2


def test_a_request_behind_a_leader_in_flight_waits_and_others_do_not() -> None:
    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        tasks = starting(gate, server, [1, 2, 3])
        await settle()
        tasks += starting(gate, server, [1, 2, 4], [5, 6])
        await settle()
        assert server.waiting() == [[1, 2, 3], [5, 6]]
        server.step()
        await settle()
        assert server.waiting() == [[1, 2, 4]]
        server.step()
        await asyncio.gather(*tasks)

    asyncio.run(run())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_when_a_leader_fails_a_follower_takes_over() -> None:
    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        first, *others = tasks = starting(gate, server, [1, 2, 3], [1, 2, 4], [1, 2, 5])
        await settle()
        server.fail([1, 2, 3])
        await settle()
        assert isinstance(first.exception(), ConnectionResetError)
        assert server.waiting() == [[1, 2, 4]]
        server.step()
        await settle()
        server.step()
        assert await asyncio.gather(*others) == [0, 2]
        tasks += starting(gate, server, [1, 2, 3])  # sent again
        await settle()
        server.step()
        assert await tasks[-1] == 2

    asyncio.run(run())


def test_when_a_leader_or_a_follower_is_cancelled_nobody_else_minds() -> None:
    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        leader, follower, other = starting(gate, server, [1, 2, 3], [1, 2, 4], [1, 2, 5])
        await settle()
        follower.cancel()
        leader.cancel()
        await settle()
        assert server.waiting() == [[1, 2, 5]]
        server.step()
        assert await other == 0

    asyncio.run(run())


def test_patience_ends_once_for_all_leaders_together_and_is_counted() -> None:
    async def run() -> None:
        gate, server = PrefixGate(0.05, 1), RadixServer()
        tasks = starting(gate, server, [1, 2, 3], [1, 2, 4], [1, 2, 4])
        await settle()
        assert server.waiting() == [[1, 2, 3]]
        await asyncio.sleep(0.1)
        assert server.waiting() == [[1, 2, 3], [1, 2, 4], [1, 2, 4]]  # of twins, the second does not wait again
        assert gate.impatient == 2
        tasks += starting(gate, server, [1, 2, 4, 5])  # and who comes later has a patience of its own
        await settle()
        assert len(server.waiting()) == 3
        server.step()
        await settle()
        server.step()
        assert await asyncio.gather(*tasks) == [0, 0, 0, 3]

    asyncio.run(run())


def test_after_a_reset_prefixes_are_computed_anew_once() -> None:
    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        tasks = starting(gate, server, [1, 2, 3])
        await settle()
        server.step()
        await settle()
        server.cache.clear()
        gate.reset()
        tasks += starting(gate, server, [1, 2, 4], [1, 2, 5])
        await settle()
        assert server.waiting() == [[1, 2, 4]]
        server.step()
        await settle()
        server.step()
        assert await asyncio.gather(*tasks) == [0, 0, 2]

    asyncio.run(run())


def test_a_reset_frees_the_waiting() -> None:
    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        tasks = starting(gate, server, [1, 2, 3], [1, 2, 4], [1, 2, 5])
        await settle()
        gate.reset()
        await settle()
        assert server.waiting() == [[1, 2, 3], [1, 2, 4]]  # the second leads now
        server.step()
        await settle()
        server.step()
        assert await asyncio.gather(*tasks) == [0, 0, 2]

    asyncio.run(run())


def test_a_leader_from_before_a_reset_vouches_for_nothing() -> None:
    """Its prompt was prefilled before the flush, although the news comes after it."""

    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        tasks = starting(gate, server, [1, 2, 3])
        await settle()
        gate.reset()
        server.step()
        server.cache.clear()
        await settle()
        tasks += starting(gate, server, [1, 2, 3, 4], [1, 2, 3, 5])
        await settle()
        assert server.waiting() == [[1, 2, 3, 4]]
        server.step()
        await settle()
        server.step()
        assert await asyncio.gather(*tasks) == [0, 0, 3]

    asyncio.run(run())


def test_evicted_prefixes_are_noticed_and_elect_leaders_again() -> None:
    async def run() -> None:
        gate, server = PrefixGate(PATIENT, 1), RadixServer()
        a, b = [1, 2, 3, 4, 5], [1, 2, 6, 7, 8]
        for prompt in (a, b):
            (task,) = starting(gate, server, prompt)
            await settle()
            server.step()
            await task
        server.cache = {as_bytes([1, 2])}  # beyond the first two tokens all are gone
        (task,) = starting(gate, server, [1, 2, 3, 4, 9])  # one finds out ...
        await settle()
        server.step()
        assert await task == 2
        tasks = starting(gate, server, [1, 2, 3, 4, 5, 1], [1, 2, 3, 4, 5, 2], [1, 2, 3, 4, 9, 1])
        await settle()
        server.step()
        await settle()
        server.step()  # ... so those who share the 5 go one first, and who shares what the finder computed goes at once
        assert await asyncio.gather(*tasks) == [4, 5, 5]
        assert [len(batch) for batch in server.batches[-2:]] == [2, 1]

    asyncio.run(run())


def test_pages_that_are_shared_in_part_only_are_not_taken_for_evicted() -> None:
    """The second wave gets 8 of the 10 tokens it shares. Who shares more with the first is still sent at once."""

    async def run() -> list[list[int]]:
        gate, server = PrefixGate(PATIENT, min_tokens=4), RadixServer(page=4)
        first = list(range(20))
        for prompt in (first, [*first[:10], 50, 51]):
            (task,) = starting(gate, server, prompt)
            await settle()
            server.step()
            await task
        tasks = starting(gate, server, [*first, 60], [*first, 61])
        await settle()
        server.step()
        await asyncio.gather(*tasks)
        return [[cached for _, cached in batch] for batch in server.batches]

    assert asyncio.run(run()) == [[0], [8], [20, 20]]
