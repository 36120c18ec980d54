"""The benchmarks of rollout servers, without servers: their work is what they say, and what is counted and drawn."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from factories import as_any

from benchmarks import overlap_report, prefix_report
from benchmarks.overlap_trial import PHASES, Lengths, check, occupancy, step
from benchmarks.prefix_trial import Journal
from benchmarks.prefix_workload import describe, make_queries, make_rollouts
from benchmarks.timed_servers import VOCABULARY, Forward
from mel_fast.rollout.prefixes import as_bytes, common_tokens
from mel_fast.types import Completion, Request


class TestReflections:
    def test_a_seed_always_gives_the_same_work_and_another_one_another(self) -> None:
        assert make_queries(3, 8) == make_queries(3, 8) != make_queries(3, 8, seed=1)

    def test_the_work_of_the_published_figures_has_not_changed(self) -> None:
        work = describe(make_queries(64, 32))
        assert (work["prompts"], work["distinct_tokens"]) == (288, 131_638)
        assert work["shareable_tokens"] == work["tokens"] - work["distinct_tokens"]  # no prompt comes twice

    def test_all_share_the_instruction_and_those_of_a_query_the_question_too(self) -> None:
        first, second = (
            [as_bytes(request.prompt_ids) for request in query.reflections] for query in make_queries(2, 8)
        )
        assert {common_tokens(first[0], other) for other in second} == {200}
        assert all(common_tokens(first[0], other) >= 240 for other in first)

    def test_rollouts_share_nothing_with_them(self) -> None:
        rollout = as_bytes(make_rollouts(1, 8)[0].prompt_ids)
        assert all(
            common_tokens(rollout, as_bytes(request.prompt_ids)) < 8
            for query in make_queries(4, 8)
            for request in query.reflections
        )


class StandInEngine:
    """Answers prompt 0 at once, the others later and later. `asked` has the phases of the requests as they came."""

    context_length = 100_000

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lengths: list[tuple[str, int, int]] = []

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[StandInSession]:
        yield StandInSession(self, 20 * int(key))


class StandInSession:
    def __init__(self, engine: StandInEngine, turns: int) -> None:
        self.engine, self.turns = engine, turns

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        (request,) = requests
        assert max(request.prompt_ids) < VOCABULARY
        phase, count = PHASES[request.prompt_ids[0] - 1], request.max_new_tokens
        self.engine.asked.append(phase)
        self.engine.lengths.append((phase, request.seed, count))
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return [Completion([9] * count, [-1.0] * count, "length", [(0, count)])]


class TestOverlap:
    def runs(self) -> dict[str, tuple[StandInEngine, dict[str, int]]]:
        found: dict[str, tuple[StandInEngine, dict[str, int]]] = {}
        for schedule in ("rollouts only", "phase by phase", "overlapped"):
            engine = StandInEngine()
            episodes, diary, _ = step(as_any(engine), schedule, 6, 4, Lengths())
            assert Counter(asked.phase for asked in diary) == Counter(engine.asked)
            found[schedule] = engine, check(episodes, schedule, 6, 4)
        return found

    def test_both_schedules_do_the_same_work_and_rollouts_are_the_same_in_all(self) -> None:
        runs = self.runs()
        barriers, overlapped = runs["phase by phase"], runs["overlapped"]
        assert sorted(barriers[0].lengths) == sorted(overlapped[0].lengths)
        assert barriers[1] == overlapped[1]
        assert runs["rollouts only"][1] == {"solve": overlapped[1]["solve"], "reflect": 0, "replay": 0}

    def test_with_barriers_no_phase_begins_before_the_last_has_ended_and_without_they_mix(self) -> None:
        runs = self.runs()
        in_order = ["solve"] * 24 + ["reflect"] * 12 + ["replay"] * 12
        assert runs["phase by phase"][0].asked == in_order
        assert sorted(runs["overlapped"][0].asked) == sorted(in_order)
        assert runs["overlapped"][0].asked != in_order

    def test_lengths_have_a_long_tail(self) -> None:
        lengths = np.array([Lengths().draw("solve", seed) for seed in range(2000)])
        assert 75 < np.median(lengths) < 85
        assert lengths.max() == Lengths().longest
        assert lengths.min() >= 8

    def test_occupancy_is_over_time(self) -> None:
        passes = [
            Forward(start, 1.0, "decode", requests, requests, 0.0) for start, requests in ((1, 4), (3, 2), (9, 9))
        ]
        found = occupancy(passes, begin=0.0, end=4.0)
        assert found == {"mean_requests": 1.5, "busy_share": 0.5, "passes": 2}


def test_a_prompt_that_should_lose_its_connection_does_so_once_and_is_counted_when_prefilled() -> None:
    class Client:
        async def generate(self, request: Request, prefilled: Any) -> Completion:
            prefilled(3)
            return Completion([], [], "stop", [])

    class Server:
        name, openings, client = "s", 2, Client()

    async def run() -> Journal:
        server, request = Server(), Request([1, 2, 3, 4], 0, 8)
        journal = Journal(failing={as_bytes(request.prompt_ids)})
        journal.watch(as_any(server))
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await server.client.generate(request, print)
        assert journal.entries == []
        await server.client.generate(request, lambda cached: None)
        return journal

    assert asyncio.run(run()).entries == [(("s", 2), as_bytes([1, 2, 3, 4]), 3)]


# --- reports ----------------------------------------------------------------------------------------------------------

DEVICE = {"name": "a processor", "versions": {"torch": "2.13.0"}}


def prefix_figures() -> dict[str, Any]:
    run = {"share": 0.991, "wall_s": 2.0, "late_share": 0.1, "load": 1.0}
    arm = {"share": 0.995, "share_of_one_tree": 0.9, "wall_s": 2.1, "latency_mean_s": 1.0, "runs": [run]}
    return {
        "date": "2026-01-01",
        "device": DEVICE,
        "sglang": "0",
        "command": "python",
        "times": "",
        "workload": {"queries": 1, "prompts": 2, "tokens": 3, "distinct_tokens": 4, "shareable_tokens": 5},
        "new_tokens": 6,
        "pool_tokens": {"small": 7, "other": 8},
        "scenarios": [
            {"name": "at once", "arms": [{"name": "naive", **arm}, {"name": "gate", **arm}]},
            {"name": "small pool", "arms": [{"name": "gate", **arm}]},
        ],
    }


def overlap_figures() -> dict[str, Any]:
    requests = [["solve", 0.0, 1.0], ["solve", 0.0, 3.0], ["reflect", 1.0, 2.0]]
    run = {"wall_s": 3.0, "mean_requests": 2.0, "busy_share": 0.5, "reached_share": 1.0, "late_share": 0, "load": 1.0}
    names = ("rollouts only", "phase by phase", "overlapped")
    return {
        "date": "2026-01-01",
        "device": DEVICE,
        "sglang": "0",
        "command": "python",
        "times": "",
        "prompts": 1,
        "group_size": 2,
        "lengths": {"median": {"solve": 80.0}, "sigma": 0.8, "longest": 600},
        "schedules": [{"name": name, "wall_s": 3.0, "runs": [run | {"requests": requests}]} for name in names],
        "cost_s": {"phase by phase": 4.0, "overlapped": 1.0},
        "cost_ratio": 0.25,
    }


@pytest.mark.parametrize(
    ("report", "figures", "said"),
    [
        (prefix_report, prefix_figures(), ["| at once | naive | 99.5% | 99.10% | 90.0% | 2.1 |", "load average 1.0"]),
        (overlap_report, overlap_figures(), ["| overlapped | 3.0 | 3.0 | 1.0 |", "with barriers: 25%"]),
    ],
)
def test_table_and_picture_are_made_from_the_file(tmp_path: Path, report: Any, figures: Any, said: list[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures))
    table, picture = report.write(path)
    assert all(text in table.read_text() for text in said)
    assert "<svg" in picture.read_text()
