"""Which metrics are drawn together, and which runs."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from report.synthetic import evaluation, make_run, settings, step

from mel_fast.report.curves import FIGURES, figures, table
from mel_fast.report.runs import differences, group_seeds, labels, open_run
from mel_fast.report.thin import Thinner, evenly


def test_every_metric_is_drawn_exactly_once_also_those_nobody_knows() -> None:
    names = [
        *("reward/correct", "mel/retention", "mel/malformed", "mel/malformed/no_critique", "mel/dropped/too_long"),
        *("eval/math-ai/aime[25]/pass_at_1", "eval/math-ai/aime[25]/avg_at_k", "time/collect", "time/other"),
        *("cache/solve/cached_share", "cache/other", "saved/new", "odd", "odd/thing", "nll/retrospective"),
    ]
    drawn = [metric for figure in figures(names, 8) for metric in figure["metrics"]]
    assert sorted(drawn) == sorted(names)
    sections = {metric: figure["section"] for figure in figures(names, 8) for metric in figure["metrics"]}
    assert (sections["odd/thing"], sections["time/other"], sections["odd"]) == ("odd", "time", "odd")


def test_the_training_reward_comes_first_and_validation_next() -> None:
    drawn = figures(["time/step", "eval/math/avg_at_k", "mel/retention", "reward/correct"], None)
    assert [figure["title"] for figure in drawn] == [
        "Training reward",
        "math: Avg@k",
        "Retention ratio",
        "Time per step",
    ]


def test_every_figure_is_explained_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "METRICS.md").read_text()
    metrics = [
        re.sub("(?<=cache/)(solve|reflect|replay)|(?<=cache/)[*]", "PHASE", m) for f in FIGURES for m in f.metrics
    ]
    assert [m for m in metrics if f"`{m.partition('*')[0]}" not in page] == []


def test_an_evaluation_and_a_step_share_a_row() -> None:
    lines = [evaluation(0, math=0.5), step(1, 0.25), evaluation(1, math=0.75) | {"time/collect": 9.0}]
    made = table(lines)
    assert made["steps"] == [0, 1]
    assert made["columns"]["eval/math/pass_at_1"] == [0.5, 0.75]
    assert made["columns"]["time/collect"] == [None, 1.0]  # the step's own


def test_runs_that_differ_only_in_seeds_belong_together(tmp_path: Path) -> None:
    configs = [
        settings(run__seed=1, run__name="one", tiny__seed=4),
        settings(run__seed=2, run__name="two", tiny__seed=5, run__folder="elsewhere"),
        settings(run__seed=1, tiny__seed=4, mel__enabled=False),
        None,
        None,
    ]
    runs = [open_run(make_run(tmp_path / str(i), [step(1)], config=c)) for i, c in enumerate(configs)]
    assert group_seeds(runs) == [[0, 1], [2], [3], [4]]
    pair = runs[:3]
    assert labels(pair, group_seeds(pair)) == ["mel.enabled=not set", "mel.enabled=false"]
    assert differences(pair, group_seeds(pair)) == [{"mel.enabled": "not set"}, {"mel.enabled": "false"}]


def test_runs_whose_settings_do_not_tell_them_apart_go_by_their_names(tmp_path: Path) -> None:
    runs = [open_run(make_run(tmp_path / name, [step(1)], config=None)) for name in ("a", "b")]
    assert labels(runs, group_seeds(runs)) == ["a", "b"]


@pytest.mark.parametrize(("total", "count"), [(10, 3), (1000, 20), (5, 5), (7, 1), (3, 9)])
def test_evenly_keeps_both_ends(total: int, count: int) -> None:
    chosen = evenly(range(total), count)
    assert len(chosen) == min(total, count)
    assert chosen[-1] == total - 1
    assert count == 1 or chosen[0] == 0
    assert len({b - a for a, b in pairwise(chosen)}) <= 2


def test_thinning_keeps_every_kth_within_both_limits_and_makes_nothing_in_vain() -> None:
    made: list[int] = []

    def make(i: int) -> tuple[int, int]:
        made.append(i)
        return i, 10

    thinner: Thinner[int] = Thinner(count=100, size=200)
    for i in range(10_000):
        thinner.offer(lambda i=i: make(i))
    kept = thinner.kept()
    assert 10 <= len(kept) <= 20
    assert {b - a for a, b in pairwise(kept)} == {kept[1] - kept[0]}
    assert (thinner.seen, len(made) < 200) == (10_000, True)


def test_one_item_beyond_every_limit_is_still_kept() -> None:
    thinner: Thinner[str] = Thinner(count=1, size=1)
    thinner.offer(lambda: ("long", 100))
    assert thinner.kept() == ["long"]
