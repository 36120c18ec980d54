"""The matrix of kills leaves no point out. What a killed run does is tests/test_restarts.py."""

from __future__ import annotations

from benchmarks.crash_trial import POINTS, matrix


def test_the_matrix_has_every_point_on_every_rank_that_passes_it() -> None:
    alone, two = ([(fault.point, fault.rank) for fault in matrix(ranks)] for ranks in (1, 2))
    assert sorted(alone) == sorted((name, 0) for name in POINTS)
    assert sorted(two) == sorted([*alone, *((name, 1) for name, point in POINTS.items() if point.every_rank)])
    for order in (alone, two):
        assert order.index(("resume: checkpoint read", 0)) > order.index(("evaluation", 0))
        assert {name for name, _ in order[-2:]} == {"export", "report"}
