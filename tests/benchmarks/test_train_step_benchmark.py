"""The train-step benchmark itself: its step is what it says, its gate refuses what is wrong, its report is what ran."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import train_step_report
from benchmarks.train_step import Plan, needed_flops, run_all
from benchmarks.train_step_contenders import Plain, Settings
from benchmarks.train_step_gate import BARS, Truth, faults, try_out
from benchmarks.train_step_trial import CONTENDERS, measure, prepare
from benchmarks.train_step_workload import (
    LONGEST,
    SHAPES,
    Shape,
    describe,
    items,
    make_episodes,
    padded_batches,
    subset,
    weights,
)
from mel_fast.distributed import World
from mel_fast.types import Episode

SMALL = Shape(32, 48, 2, 4, 2, 8, vocab=128, groups=4, shorter=64, token_budget=128)
WITHOUT_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("checkpoint")
    prepare(SMALL, ["rl", "mel"], 0, folder, torch.device("cpu"))
    return Settings(folder, World(0, 1, torch.device("cpu")), SMALL.token_budget, "none")


def truth_of(settings: Settings, workload: str) -> Truth:
    return Truth(**torch.load(settings.folder / f"{workload}.pt"))


def step(workload: str = "mel") -> list[Episode]:
    return make_episodes(SMALL, workload, seed=0)


class TestWorkload:
    def test_a_seed_always_gives_the_same_step_and_another_one_another(self) -> None:
        prints = [describe(items(make_episodes(SMALL, "mel", seed)))["fingerprint"] for seed in (0, 0, 1)]
        assert prints[0] == prints[1] != prints[2]

    def test_the_recorded_step_of_the_published_figures_has_not_changed(self) -> None:
        found = describe(items(make_episodes(SHAPES["tiny"], "mel", 0)))
        assert (found["tokens"], found["fingerprint"]) == (5640, "832f0985495aadfa")

    def test_it_has_the_mix_of_a_step(self) -> None:
        work = items(make_episodes(SHAPES["0.6b"], "mel", 0))
        policy, memos = [i for i in work if i.policy], [i for i in work if not i.policy]
        lengths = np.array([len(i.target) for i in policy])
        assert len(policy) == 16 * 8
        assert 0.2 < sum(i.advantage == 0 for i in policy) / len(policy) < 0.4
        assert 800 < np.median(lengths) < 1250
        assert lengths.max() <= LONGEST
        assert all(50 <= len(i.context) <= 400 for i in policy)
        assert len(memos) == 11  # one for each group with both outcomes
        assert all(len(m.context) > 700 for m in memos)
        assert 400 < np.mean([len(m.target) for m in memos]) < 650

    def test_both_workloads_have_the_same_responses(self) -> None:
        assert items(step("rl")) == [item for item in items(step("mel")) if item.policy]

    def test_weights_make_means_of_means(self) -> None:
        work = items(step())
        shares = [w * len(i.target) for w, i in zip(weights(work), work, strict=True)]
        assert sum(s for s, i in zip(shares, work, strict=True) if i.policy) == pytest.approx(1)
        assert sum(s for s, i in zip(shares, work, strict=True) if not i.policy) == pytest.approx(1)

    def test_needed_flops_are_those_of_the_sequences_with_a_gradient(self) -> None:
        """The formula of the benchmark's docstring, with the weights counted from a model."""
        shape, work = SHAPES["4b"], items(make_episodes(SHAPES["4b"], "mel", 0))
        block = 2560 * (32 + 2 * 8) * 128 + 32 * 128 * 2560 + 3 * 2560 * 9728
        expected = sum(
            6 * 36 * block * i.length + 6 * 36 * 32 * 128 * i.length**2 + 6 * 2560 * 151936 * len(i.target)
            for i in work
            if i.advantage != 0
        )
        assert needed_flops(work, shape) == pytest.approx(expected)

    def test_padded_batches_keep_the_order_and_the_budget(self) -> None:
        lengths = [5, 9, 3, 3, 40, 2, 2, 2, 2]
        batches = padded_batches(lengths, 18)
        assert [i for batch in batches for i in batch] == list(range(len(lengths)))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 18 for b in batches)
        assert batches == [[0, 1], [2, 3], [4], [5, 6, 7, 8]]


def doubled_nll(self: Plain, *tensors: Tensor) -> Tensor:
    ids, mask, advantage, weight, policy = tensors
    return Plain._loss(self, ids, mask, advantage, torch.where(policy, weight, 2 * weight), policy)


def scaled(self: Plain, *tensors: Tensor) -> Tensor:
    return 1.001 * Plain._loss(self, *tensors)


def without_right_responses(self: Plain, *tensors: Tensor) -> Tensor:
    ids, mask, advantage, weight, policy = tensors
    return Plain._loss(self, ids, mask, advantage * (advantage < 0) + (~policy) * advantage, weight, policy)


def not_finite(self: Plain, *tensors: Tensor) -> Tensor:
    return Plain._loss(self, *tensors) * float("nan")


class TestGate:
    @pytest.mark.parametrize("workload", ["rl", "mel"])
    @pytest.mark.parametrize("name", [n if "trl" not in n else pytest.param(n, marks=WITHOUT_TRL) for n in CONTENDERS])
    def test_contenders_train_the_same_step(self, settings: Settings, name: str, workload: str) -> None:
        errors = try_out(CONTENDERS[name](settings), subset(step(workload)), truth_of(settings, workload))
        assert not faults(errors, BARS["float32"])

    @pytest.mark.parametrize(
        ("mistake", "named"),
        [
            (doubled_nll, "direction"),
            (scaled, "gradient norm"),
            (without_right_responses, "direction"),
            (not_finite, "loss"),
        ],
    )
    def test_a_mistake_gets_no_time(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., Tensor], named: str
    ) -> None:
        contender = Plain(settings, by_length=True)
        monkeypatch.setattr(contender, "_loss", mistake.__get__(contender))
        entry = measure(contender, step(), truth_of(settings, "mel"), 0.0)
        assert entry["status"] == "gate"
        assert named in entry["reason"]
        assert "median_ms" not in entry

    def test_what_passes_is_measured_in_phases_that_add_up(self, settings: Settings) -> None:
        entry = measure(CONTENDERS["mel_fast"](settings), step(), truth_of(settings, "mel"), 0.0)
        assert entry["status"] == "ok"
        assert len(entry["times_ms"]) == 2
        assert set(entry["phases_ms"]) == {"pack", "forward", "backward", "optimizer", "rest"}
        assert entry["phases_ms"]["forward"] > 0
        assert entry["peak_bytes"] >= 0


def entry(name: str, seconds: float) -> dict[str, Any]:
    milliseconds = 1e3 * seconds
    return {
        "name": name,
        "status": "ok",
        "median_ms": milliseconds,
        "quartiles_ms": [milliseconds, milliseconds],
        "peak_bytes": 2**20,
        "phases_ms": {"forward": 1.0, "backward": 2.0},
        "errors": {"loss": 1e-9, "norm": 1e-9, "angle": 1e-9},
        "tokens_per_s": 1000 / seconds,
        "flops_per_s": 1e9 / seconds,
    }


class TestReport:
    def report(self, *contenders: dict[str, Any], peak: float | None = None) -> dict[str, Any]:
        found = {"name": "rl", **describe(items(step("rl"))), "needed_flops": 1e9, "contenders": list(contenders)}
        return {"workloads": [found], "peak_flops": peak}

    def test_ratios_are_those_of_times(self) -> None:
        table = train_step_report.markdown_table(self.report(entry("mel_fast", 2), entry("trl", 6), entry("plain", 3)))
        row = next(line for line in table.splitlines() if line.startswith("| mel_fast"))
        assert row.startswith("| mel_fast | 2000 (2000 to 2000) | 500 | 3.00 | 1.50 | 0.5 | 1 |")

    def test_utilisation_is_given_where_the_peak_is_known(self) -> None:
        table = train_step_report.markdown_table(self.report(entry("mel_fast", 2), peak=1e9))
        assert "| MFU |" in table
        assert "| 50.0% |" in table

    def test_who_is_absent_or_wrong_is_named_without_a_time(self) -> None:
        missing = {"name": "trl", "status": "absent", "reason": "not installed: trl"}
        wrong = {"name": "plain", "status": "gate", "reason": "loss error 1", "errors": {}}
        table = train_step_report.markdown_table(self.report(entry("mel_fast", 2), missing, wrong))
        assert "- **trl**: absent: not installed: trl" in table
        assert "- **plain**: no time, it failed the gate: loss error 1" in table
        assert "| plain |" not in table

    def test_a_spent_budget_is_said(self, tmp_path: Path) -> None:
        plan = Plan("tiny", ["rl"], ["mel_fast"], 1024, "none", deadline=0.0)
        with pytest.raises(SystemExit, match="the budget is spent"):
            run_all(plan, tmp_path / "x.json", "")

    @pytest.mark.slow
    def test_one_command_measures_every_contender_in_a_process_of_its_own(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "results" / "step.json"
        plan = Plan("tiny", ["mel"], ["mel_fast", "trl"], 1024, "none", seconds=0.0)
        run_all(plan, path, "python -m benchmarks.train_step")
        report = json.loads(path.read_text())
        (found,) = report["workloads"]
        ours, trl = found["contenders"]
        assert ours["status"] == "ok", ours["reason"]
        assert ours["tokens_per_s"] == pytest.approx(found["tokens"] / ours["median_ms"] * 1e3, rel=1e-3)
        assert report["peak_flops"] is None  # no MFU on a CPU
        installed = importlib.util.find_spec("trl") is not None
        assert trl["status"] == ("ok" if installed else "absent")
        written = train_step_report.write(path)
        assert f"torch {torch.__version__}" in written[0].read_text()
        assert train_step_report.markdown_table(report) in written[0].read_text()
        assert "mel_fast: mel" in capsys.readouterr().out
