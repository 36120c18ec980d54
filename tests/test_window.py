"""The window over prompts under way."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from radix_server import settle

from mel_fast.rollout.sglang.gate import Window


def test_the_window_is_first_come_first_served_and_holds_no_more_than_its_size() -> None:
    async def run() -> None:
        window, inside = Window(10), []
        leave = [asyncio.Event() for _ in range(5)]

        async def visit(place: int, tokens: int) -> None:
            async with window.hold(tokens):
                inside.append(place)
                await leave[place].wait()
            inside.remove(place)

        tasks = [asyncio.create_task(visit(place, tokens)) for place, tokens in enumerate((6, 3, 5, 1, 25))]
        await settle()
        assert inside == [0, 1]  # the 1 would fit, but does not overtake the 5
        leave[0].set()
        await settle()
        assert inside == [1, 2, 3]
        for place in (1, 2):
            leave[place].set()
        await settle()
        assert inside == [3]
        leave[3].set()
        await settle()
        assert inside == [4]  # larger than the window: alone
        leave[4].set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_what_is_not_needed_any_more_lets_others_in() -> None:
    async def run() -> None:
        window, inside = Window(10), asyncio.Event()

        async def other() -> None:
            async with window.hold(6):
                inside.set()

        async with window.hold(8) as keep:
            task = asyncio.create_task(other())
            keep(5)
            await settle()
            assert not inside.is_set()
            keep(4)
            await settle()
            assert inside.is_set()
            keep(8)
        await task
        async with window.hold(11):  # nothing is left behind: this one is let in only when the window is empty
            pass

    asyncio.run(run())


def test_what_is_larger_than_the_window_lets_nobody_in_beside_it() -> None:
    async def run() -> None:
        window, order = Window(10), []

        async def visit(name: str, tokens: int) -> None:
            async with window.hold(tokens):
                order.append(f"{name} in")
                await settle()
                order.append(f"{name} out")

        await asyncio.gather(visit("large", 50), visit("small", 1), visit("larger", 60))
        assert order == ["large in", "large out", "small in", "small out", "larger in", "larger out"]

    asyncio.run(run())


def test_a_visit_cancelled_in_the_moment_of_its_turn_leaves_its_place_to_the_next() -> None:
    async def run() -> None:
        window, leave, inside = Window(10), asyncio.Event(), []

        async def first() -> None:
            async with window.hold(10):
                await leave.wait()
            second.cancel()  # its turn has come, it has not run yet

        async def visit(name: str) -> None:
            async with window.hold(10):
                inside.append(name)

        one = asyncio.create_task(first())
        await settle()
        second, third = asyncio.create_task(visit("second")), asyncio.create_task(visit("third"))
        await settle()
        leave.set()
        async with asyncio.timeout(5):
            await asyncio.gather(one, third)
        assert second.cancelled()
        assert inside == ["third"]

    asyncio.run(run())


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3), st.booleans()), max_size=12))
def test_whoever_is_cancelled_when_the_window_is_whole_afterwards(visits: list[tuple[int, int, bool]]) -> None:
    """Visits of (tokens, turns of the loop inside, whether it is cancelled two turns after it came)."""

    async def run() -> None:
        window, used = Window(10), 0

        async def visit(tokens: int, turns: int) -> None:
            nonlocal used
            async with window.hold(tokens):
                used += tokens
                assert used <= max(10, tokens)
                try:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                finally:
                    used -= tokens

        tasks = [asyncio.create_task(visit(tokens, turns)) for tokens, turns, _ in visits]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task, (_, _, cancelled) in zip(tasks, visits, strict=True):
            if cancelled:
                task.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not any(task.exception() for task in tasks if not task.cancelled())
            async with window.hold(10):  # fits only if nothing is left behind
                pass

    asyncio.run(run())
