"""One run of the prefix-sharing benchmark: reflections go through the trainer's engine to real servers in some way.

What is counted is every prompt that a server has prefilled, with the tokens that it had cached: also those of requests
that were sent again later because the server was lost.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM

from benchmarks.prefix_workload import Query
from mel_fast.rollout.prefixes import as_bytes, shareable_tokens
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.gate import Window
from mel_fast.rollout.sglang.server import Server
from mel_fast.types import Completion, Request

FAULT_S = 0.03  # until an imposed connection fault is noticed


@dataclass(frozen=True)
class Arm:
    """A way of sending: the trainer's gate and window or not, an order, a bound on what is in flight."""

    name: str
    gate: bool = False
    window: bool = False
    in_flight: int | None = None
    scattered: bool = False  # every request in a session of its own, so that servers take turns
    lpm: bool = False  # servers that schedule by longest prefix match


@dataclass(frozen=True)
class Scenario:
    """What the servers meet."""

    name: str
    arms: tuple[Arm, ...]
    servers: int = 1
    arrival_s: float = 0.0  # over which the queries arrive, evenly
    rollouts: int = 0  # decoding meanwhile
    faults: bool = False  # the first request of every second query loses its connection once
    small_pool: bool = False
    kill_at_s: float | None = None  # the first server is killed


@dataclass
class Journal:
    """What the servers prefilled: (server and its opening, prompt, tokens cached)."""

    entries: list[tuple[tuple[str, int], bytes, int]] = field(default_factory=list)
    failing: set[bytes] = field(default_factory=set)  # prompts that still have to lose their connection

    def watch(self, server: Server) -> None:
        generate = server.client.generate

        async def watched(request: Request, prefilled: Callable[[int], None]) -> Completion:
            prompt = as_bytes(request.prompt_ids)
            if prompt in self.failing:
                self.failing.remove(prompt)
                await asyncio.sleep(FAULT_S)
                raise aiohttp.ServerDisconnectedError("imposed")

            def seen(cached: int) -> None:
                self.entries.append(((server.name, server.openings), prompt, cached))
                prefilled(cached)

            return await generate(request, seen)

        server.client.generate = watched


def measure(
    engine: SGLangEngine, scenario: Scenario, arm: Arm, queries: Sequence[Query], rollouts: Sequence[Request]
) -> dict[str, Any]:
    """Runs it once, with cold caches.

    Args:
        engine: with the arm's settings, but for the window, which is opened here when the arm has none.
    """
    journal = Journal()
    if scenario.faults:
        journal.failing = {as_bytes(query.reflections[0].prompt_ids) for query in queries[::2]}
    for server in engine.servers:
        journal.watch(server)
        if not arm.window:
            server.window = Window(2**31)
    answers, latencies, wall = asyncio.run(_drive(engine, scenario, arm, queries, rollouts))
    asked = [request for query in queries for request in query.reflections]
    check(asked, answers, journal, Path(engine.publisher.model_path))
    ours = {as_bytes(request.prompt_ids) for request in asked}
    by_cache: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
    saved = 0
    for cache, prompt, cached in journal.entries:
        if prompt in ours:
            by_cache[cache].append(prompt)
            saved += cached
    optimum = sum(map(shareable_tokens, by_cache.values()))
    counted = engine.take_metrics()
    return {
        "saved_tokens": saved,
        "optimum_tokens": optimum,
        "share": saved / optimum,
        "share_of_one_tree": saved / shareable_tokens([p for prompts in by_cache.values() for p in prompts]),
        "wall_s": round(wall, 3),
        "latency_mean_s": round(sum(latencies) / len(latencies), 3),
        "prefilled": sum(map(len, by_cache.values())),
        "engine": {name.removeprefix("engine/"): value for name, value in counted.items() if value},
    }


async def _drive(
    engine: SGLangEngine, scenario: Scenario, arm: Arm, queries: Sequence[Query], rollouts: Sequence[Request]
) -> tuple[list[Completion], list[float], float]:
    """The completions of all reflections in order, seconds from each query's arrival to its last, seconds of all."""
    slots = asyncio.Semaphore(arm.in_flight or 2**31)
    latencies: list[float] = []
    decoding = [asyncio.create_task(_ask(engine, [request])) for request in rollouts[: scenario.rollouts]]
    if decoding:
        await asyncio.sleep(1.0)
    begin = time.monotonic()

    async def one(request: Request) -> Completion:
        async with slots:
            return (await _ask(engine, [request]))[0]

    async def answer(place: int, query: Query) -> list[Completion]:
        arrival = scenario.arrival_s * place / len(queries)
        await asyncio.sleep(arrival)
        if arm.scattered or arm.in_flight:
            answers = list(await asyncio.gather(*map(one, query.reflections)))
        else:
            answers = await _ask(engine, query.reflections)
        latencies.append(time.monotonic() - begin - arrival)
        return answers

    tasks = [asyncio.create_task(answer(place, query)) for place, query in enumerate(queries)]
    if scenario.kill_at_s is not None:
        await asyncio.sleep(scenario.kill_at_s)
        process = engine.servers[0].process
        assert process is not None
        await asyncio.to_thread(process.kill)
    answers = [completion for found in await asyncio.gather(*tasks) for completion in found]
    wall = time.monotonic() - begin
    await asyncio.gather(*decoding)
    return answers, latencies, wall


async def _ask(engine: SGLangEngine, requests: Sequence[Request]) -> list[Completion]:
    async with engine.session("") as session:
        return await session.generate(requests)


def check(asked: Sequence[Request], answers: Sequence[Completion], journal: Journal, model: Path) -> None:
    """The gate before any figure: each request was answered, in full, to the prompt that was sent.

    Raises AssertionError. That a prompt arrived as it was sent, and that shared prefixes change nothing, is seen from
    the log-probs of some answers, which must be transformers' own for that prompt.
    """
    assert len(asked) == len(answers)
    assert not journal.failing, "a request that should have lost its connection was not sent"
    prefilled = {prompt for _, prompt, _ in journal.entries}
    for request, answer in zip(asked, answers, strict=True):
        assert as_bytes(request.prompt_ids) in prefilled
        assert len(answer.output_ids) == len(answer.logprobs) == request.max_new_tokens
        assert answer.cached_tokens is not None
        assert 0 <= answer.cached_tokens < len(request.prompt_ids)
        assert all(map(math.isfinite, answer.logprobs))
    truth: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    for place in range(0, len(asked), max(1, len(asked) // 12)):
        prompt, output = asked[place].prompt_ids, answers[place].output_ids
        with torch.no_grad():
            logits = truth(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(output)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(answers[place].logprobs), expected, atol=1e-3, rtol=1e-3)
