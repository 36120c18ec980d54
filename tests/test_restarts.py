"""`torchrun --max-restarts` brings a run back by itself. `benchmarks/crash_soak.py` is this at length."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.crash_soak import SETTINGS, differences, run
from benchmarks.crash_trial import Fault
from mel_fast.dumps import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_world")]


def test_a_run_that_was_killed_and_then_hung_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Before the first checkpoint it starts over, after it it goes on from there: in one directory."""
    small = [*SETTINGS, "--eval.every=0", "--run.steps=4", "--run.phase_timeout_minutes=0.05"]
    whole = run(tmp_path / "whole", 1, [], False, small)
    assert whole["status"] == 0, whole["output"][-3000:]
    assert [line["step"] for line in read_jsonl(whole["directory"] / "metrics.jsonl")] == [1, 2, 3, 4]

    killed, hung = Fault(0, "optimizer step", 1), Fault(0, "packing", 3, hang=True)
    done = run(tmp_path / "struck", 1, [killed, hung], True, small)
    assert done["status"] == 0, done["output"][-3000:]
    assert [line["event"] for line in done["log"]][:5] == ["collect", "kill", "collect", "hang", "collect"]
    assert differences(whole["directory"], done["directory"]) == []
    assert len(list((tmp_path / "struck" / "runs").iterdir())) == 2, "the run and `latest`"
    assert "going on after step 2" in done["output"]
    told = "rank 0 is in 'update' after 2 finished steps for longer than run.phase_timeout_minutes=0.05"
    stacks = (done["directory"] / "stacks" / "rank_0.txt").read_text()
    assert told in done["output"]
    assert told in stacks
    assert "in strike" in stacks, "where it hung"
    assert done["processes"] == 0
