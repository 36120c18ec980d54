"""The episodes of each step, in turn. In async mode the next step's are sampled while this one's train."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self

from mel_fast.data import Cursor
from mel_fast.experience import Collector
from mel_fast.types import Episode


class Feed:
    """Args:
    collector, cursor: who samples, and from which prompts.
    prompts_per_step: drawn from the cursor for each step.
    ahead: sample one step ahead, in a thread (`rollout.mode=async`).
    steps: of the run; nothing is sampled for later ones.

    Use it as a context manager: what is still being sampled is given up at its end.
    """

    def __init__(self, collector: Collector, cursor: Cursor, prompts_per_step: int, *, ahead: bool, steps: int) -> None:
        self.collector, self.cursor = collector, cursor
        self.prompts_per_step, self.ahead, self.steps = prompts_per_step, ahead, steps
        self._taken = cursor.state()
        self._epoch = cursor.epoch
        self._next: Future[list[Episode]] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="feed", daemon=True)

    def __enter__(self) -> Self:
        if self.ahead:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.ahead:
            self._run(self._give_up()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def take(self, step: int) -> list[Episode]:
        """The episodes of a step (counted from 0); waits for them. In async mode those of the step after are begun."""
        if self.ahead:
            episodes = (self._next or self._run(self._sample(step))).result()
        else:  # in this thread, whose threads of computation the local engine then shares
            episodes = asyncio.run(self._sample(step))
        self._taken, self._epoch = self.cursor.state(), self.cursor.epoch
        if self.ahead:
            self._next = self._run(self._sample(step + 1)) if step + 1 < self.steps else None
        return episodes

    @property
    def epoch(self) -> int:
        """Of the prompts of the step taken last."""
        return self._epoch

    def state(self) -> dict[str, Any]:
        """Where the data stand after the step taken last: a resumed run samples again what was begun ahead."""
        return self._taken

    async def _sample(self, step: int) -> list[Episode]:
        return await self.collector.collect(self.cursor.next(self.prompts_per_step), step)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _give_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
