"""The feed of episodes: one step at a time, or one step ahead."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from factories import as_any, episode, make_prompt

from mel_fast.data import Cursor
from mel_fast.feed import Feed
from mel_fast.types import Episode, Prompt

STEPS = 4


class Sampler:
    """Stands in for the collector. `may_end` holds samples back; `begun`, `ended` and `given_up` are steps."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.given_up: list[int] = []
        self.may_end = threading.Event()
        self.may_end.set()

    async def collect(self, prompts: Sequence[Prompt], step: int) -> list[Episode]:
        self.begun.append(step)
        try:
            while not self.may_end.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.given_up.append(step)
            raise
        if step == 99:
            raise RuntimeError("a bad step")
        self.ended.append(step)
        return [episode([1], id=prompt.id) for prompt in prompts]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def sampler() -> Iterator[Sampler]:
    sampler = Sampler()
    yield sampler
    sampler.may_end.set()


def feed(sampler: Sampler, ahead: bool, state: dict[str, object] | None = None, steps: int = STEPS) -> Feed:
    cursor = Cursor([make_prompt(f"p{index}") for index in range(5)], seed=1)
    if state is not None:
        cursor.restore(state)
    return Feed(as_any(sampler), cursor, 3, ahead=ahead, steps=steps)


def ids(episodes: Sequence[Episode]) -> list[str]:
    return [episode.prompt.id for episode in episodes]


def test_sampling_ahead_draws_the_same_prompts_for_each_step(sampler: Sampler) -> None:
    with feed(sampler, False) as one, feed(Sampler(), True) as other:
        for step in range(STEPS):
            assert ids(one.take(step)) == ids(other.take(step))
            assert one.epoch == other.epoch


def test_a_restored_feed_goes_on_after_the_step_taken_last(sampler: Sampler, ahead: bool) -> None:
    """What was begun ahead is sampled again: no prompt is lost, none comes twice."""
    with feed(sampler, ahead) as whole:
        expected = [ids(whole.take(step)) for step in range(STEPS)]
    with feed(sampler, ahead) as first:
        before = [ids(first.take(step)) for step in range(2)]
        state = first.state()
    with feed(sampler, ahead, state) as second:
        after = [ids(second.take(step)) for step in (2, 3)]
    assert before + after == expected


def test_one_step_is_begun_ahead_and_none_after_the_last(sampler: Sampler) -> None:
    with feed(sampler, True) as source:
        for step in range(STEPS):
            source.take(step)
            wait_until(lambda s=step: sampler.begun[-1] == min(s + 1, STEPS - 1))
    assert sampler.begun == list(range(STEPS))


def test_without_going_ahead_nothing_is_begun_early(sampler: Sampler) -> None:
    with feed(sampler, False) as source:
        source.take(0)
    assert sampler.begun == [0]


def test_what_is_being_sampled_at_the_end_is_given_up(sampler: Sampler) -> None:
    with feed(sampler, True) as source:
        source.take(0)
        wait_until(lambda: sampler.ended == [0, 1])
        sampler.may_end.clear()
        source.take(1)
        wait_until(lambda: sampler.begun[-1] == 2)
    assert sampler.given_up == [2]


def test_an_error_while_sampling_is_raised_by_the_step_it_belongs_to(sampler: Sampler, ahead: bool) -> None:
    with feed(sampler, ahead, steps=200) as source:
        source.take(98)
        with pytest.raises(RuntimeError, match="a bad step"):
            source.take(99)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
