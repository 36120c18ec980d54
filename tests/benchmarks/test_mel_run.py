"""The verdict on a MEL run, and on training curves: what is wrong is said."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from benchmarks import mel_run
from benchmarks.curves import COMPARED, deviations
from benchmarks.mel_run import faults, run, summary


def steps(count: int = 8) -> list[dict[str, float]]:
    return [
        {
            "step": number,
            "loss/total": 0.1,
            "optim/grad_norm": 1.0,
            "policy/ratio_max": 1.0,
            "policy/rollout_gap": 1e-6,
            "mel/kept": 3.0,
            "reward/correct": 0.1 * number,
            "time/step": 5.0 if number == 1 else 1.0,
        }
        for number in range(1, count + 1)
    ]


def test_a_run_that_learns_has_no_fault() -> None:
    assert faults(steps(), "cpu") == []


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("loss/total", {3: math.nan}, r"loss/total is not finite in steps \[4\]"),
        ("optim/grad_norm", {0: math.inf}, "optim/grad_norm is not finite"),
        ("policy/ratio_max", {5: 1.001}, r"ratio is not 1.* in steps \[6\]"),
        ("policy/rollout_gap", {2: 1e-3}, "log-probs of engine and trainer differ by 0.001"),
        ("mel/kept", dict.fromkeys(range(4), 0.0), "kept in less than half"),
        ("reward/correct", dict.fromkeys(range(8), 0.5), "did not rise: 0.500, then 0.500"),
    ],
)
def test_what_is_wrong_is_said(name: str, values: dict[int, float], expected: str) -> None:
    seen = steps()
    for index, value in values.items():
        seen[index][name] = value
    (fault,) = faults(seen, "cpu")
    assert re.search(expected, fault)


def test_too_few_steps_are_no_success() -> None:
    assert faults(steps(3), "cpu") == ["3 steps were finished, at least 4 are needed to judge"]
    assert faults([], "cuda")


def test_means_leave_out_the_step_that_warms_up() -> None:
    assert summary(steps())["time/step"] == 1.0


def test_a_run_that_does_not_start_or_takes_too_long_is_told_from_one_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(python: str) -> None:
        script = tmp_path / "script.py"
        script.write_text(python)
        monkeypatch.setattr(mel_run, "MODULE", [str(script)])

    command("import sys; sys.exit(2)")
    assert run([], tmp_path, 60) == ([], "exit status 2")
    line = '{"step": 1, "loss/total": 0.5}\\n{"step": 1, "eval/x": 1}\\n'
    command(
        f"""
import pathlib, time
folder = pathlib.Path({str(tmp_path)!r}, "latest")
folder.mkdir()
(folder / "metrics.jsonl").write_text({line!r}.encode().decode("unicode_escape"))
time.sleep(600)
"""
    )
    assert run([], tmp_path, 5) == ([{"step": 1, "loss/total": 0.5}], "ended after 5 s")


def test_deviations_are_the_largest_of_all_steps() -> None:
    reference = [dict.fromkeys(COMPARED, 2.0)] * 3
    ours = [dict(step) for step in reference]
    ours[1]["loss/nll"], ours[2]["loss/nll"], ours[2]["optim/grad_norm"] = 2.2, 1.9, math.nan
    found = deviations(ours, reference)
    assert found["loss/nll"] == pytest.approx(0.1)
    assert found["optim/grad_norm"] == math.inf
    assert found["policy/entropy"] == 0
