"""What the gate and the window are for, in small: reflections through a real server whose forward passes take time, and
whose KV pool is smaller than what they need together. The benchmark, benchmarks/prefix_sharing.py, has more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.prefix_trial import Arm, Scenario, measure
from benchmarks.prefix_workload import Query, describe, make_queries, make_rollouts
from benchmarks.timed_servers import TimedServer, attach, running, save_model, server

NAIVE, GATE = Arm("naive"), Arm("gate", gate=True, window=True)
POOL = 16_000  # tokens


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    return make_queries(12, new_tokens=8)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TimedServer]:
    folder = tmp_path_factory.mktemp("timed")
    process = server(folder, save_model(folder), "timed", POOL)
    with running([process]):
        yield process


def run(timed: TimedServer, tmp_path: Path, scenario: Scenario, arm: Arm, queries: list[Query]) -> dict[str, Any]:
    with attach([timed], tmp_path, prefix_gate=arm.gate) as engine:
        return measure(engine, scenario, arm, queries, make_rollouts(4, new_tokens=60))


def test_the_reflections_are_more_than_the_pool_holds_and_share_half_their_tokens(queries: list[Query]) -> None:
    work = describe(queries)
    assert work["distinct_tokens"] > POOL
    assert 0.4 < work["shareable_tokens"] / work["tokens"] < 0.6


def test_without_the_gate_a_good_part_is_computed_again(
    timed: TimedServer, tmp_path: Path, queries: list[Query]
) -> None:
    assert run(timed, tmp_path, Scenario("at once", ()), NAIVE, queries)["share"] < 0.9


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario("at once", ()),
        Scenario("staggered under rollouts", (), arrival_s=1.5, rollouts=4),
        Scenario("leaders fail", (), faults=True),
    ],
    ids=lambda scenario: scenario.name,
)
def test_with_it_every_prefix_is_computed_once(
    timed: TimedServer, tmp_path: Path, queries: list[Query], scenario: Scenario
) -> None:
    found = run(timed, tmp_path, scenario, GATE, queries)
    assert found["share_of_one_tree"] >= 0.99
    assert found["engine"].get("retried", 0) == (6 if scenario.faults else 0)
    assert "impatient" not in found["engine"]
