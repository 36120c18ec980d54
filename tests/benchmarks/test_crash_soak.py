"""The matrix of kills leaves no point out. What a killed run does is tests/test_restarts.py."""

from __future__ import annotations

import pytest

from benchmarks.crash_trial import matrix, points


@pytest.mark.parametrize("engine", ["local", "sglang"])
def test_the_matrix_has_every_point_on_every_rank_that_passes_it(engine: str) -> None:
    passed = points(engine)
    alone, two = ([(fault.point, fault.rank) for fault in matrix(ranks, engine)] for ranks in (1, 2))
    assert sorted(alone) == sorted((name, 0) for name in passed)
    assert sorted(two) == sorted([*alone, *((name, 1) for name, point in passed.items() if point.every_rank)])
    ends = ["export", "report"] if engine == "local" else ["export", "report", "servers end"]
    for order in (alone, two):
        assert order.index(("resume: checkpoint read", 0)) > order.index(("evaluation", 0))
        assert [name for name, rank in order if rank == 0][-len(ends) :] == ends
