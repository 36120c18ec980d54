"""Whole runs of the embedded world on real SGLang servers, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.crash_soak import amiss, differences, run
from benchmarks.crash_trial import Fault
from mel_fast.dumps import load_episodes, read_jsonl
from mel_fast.train import main
from mel_fast.types import Episode

STEPS = 6
COMMON = (
    "--rollout.engine=sglang",
    "--rollout.sglang.health_every_s=1",
    "--rollout.sglang.gate_min_tokens=1",  # prompts are short here
    f"--run.steps={STEPS}",
    "--run.checkpoint_every=2",
    "--eval.every=0",
    "--eval.samples=1",
    "--eval.sets=[{path: '{tiny}/heldout.jsonl'}]",
)
ASYNC = ("--rollout.mode=async", "--objective.tis_cap=2")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_world")]


def steps_of(run: Path) -> list[dict[str, float]]:
    return [line for line in read_jsonl(run / "metrics.jsonl") if "loss/total" in line]


def episodes_of(run: Path) -> list[list[Episode]]:
    return [load_episodes(path) for path in sorted((run / "rollouts").glob("step_*.jsonl"))]


def prompts_of(run: Path) -> list[list[str]]:
    return [[episode.prompt.id for episode in step] for step in episodes_of(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strictly on-policy, on one server, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([f"--run.folder={folder}", *COMMON]) == 0
    return (folder / "latest").resolve()


def test_a_run_on_a_server_learns_as_one_on_the_local_engine(whole: Path) -> None:
    scores = {
        line["step"]: line["eval/heldout/pass_at_1"]
        for line in read_jsonl(whole / "metrics.jsonl")
        if "eval/heldout/pass_at_1" in line
    }
    assert scores[STEPS] > scores[0] + 0.1
    steps = steps_of(whole)
    assert all(line["mel/kept"] > 0 for line in steps)
    assert all(line["policy/ratio_max"] == 1.0 and line["rollout/staleness_max"] == 0.0 for line in steps), "on-policy"
    assert all(line["policy/rollout_gap_max"] < 1e-3 for line in steps), "trainer and server compute alike"
    assert all(line["cache/reached_share"] > 0.9 for line in steps)
    assert all(line["engine/lost"] == 0 for line in steps)
    assert (whole / "servers" / "server-0.log").stat().st_size > 0


def test_every_token_names_the_weights_that_sampled_it(whole: Path) -> None:
    for step, episodes in enumerate(episodes_of(whole)):
        assert len(episodes) == 16
        for trajectory in (t for episode in episodes for t in episode.trajectories):
            assert trajectory.versions == [(step, len(trajectory.output_ids))]


PUBLISHING = Fault(0, "publication: files sent", 4)  # in the third step


@pytest.mark.parametrize("faults", [[], pytest.param([PUBLISHING], marks=pytest.mark.soak)], ids=["whole", "killed"])
def test_async_trains_on_tokens_one_update_old_at_most_also_when_torchrun_has_to_bring_it_back(
    whole: Path, tmp_path: Path, faults: list[Fault]
) -> None:
    """Killed while it publishes weights, with the next step's samples under way: the same prompts in the same steps as
    any other run, none twice; and no server, nor weights for it, outlives the run."""
    done = run(tmp_path / "struck", 1, faults, True, [*COMMON, *ASYNC])
    assert done["status"] == 0, done["output"][-3000:]
    assert [line["event"] for line in done["log"]] == ["collect", *["kill", "collect"] * len(faults)]
    assert ("going on after step 2" in done["output"]) == bool(faults)
    assert differences(whole, done["directory"], exact=False) == []
    assert amiss(done["directory"], oldest=1) == []
    assert (done["processes"], done["copies"]) == (0, [])
    steps = steps_of(done["directory"])
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert max(line["rollout/staleness_max"] for line in steps) == 1.0
    assert all("policy/tis" in line and line["policy/rollout_gap"] < 0.1 for line in steps)


@pytest.mark.soak
def test_a_server_killed_in_mid_step_costs_nothing_but_time(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "--rollout.sglang.servers=2")
    directory = tmp_path / "latest"
    wait_for_steps(directory, 2, process)
    keepers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "keeper.py"], capture_output=True, text=True)
    first, _ = map(int, keepers.stdout.split())
    os.killpg(first, signal.SIGKILL)
    assert process.wait(300) == 0
    steps = steps_of(directory)
    assert sum(line["engine/lost"] for line in steps) == 1
    assert prompts_of(directory) == prompts_of(whole)
    assert all(len(episode.trajectories) == 8 for step in episodes_of(directory) for episode in step)
    assert all(line["rollout/staleness_max"] == 0 and line["policy/rollout_gap_max"] < 1e-3 for line in steps)


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "mel_fast.train", f"--run.folder={folder}", *COMMON, "--eval.at_ends=false", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_steps(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while not (run / "metrics.jsonl").exists() or len(steps_of(run)) < count:
        assert process.poll() is None, "the run ended early"
        time.sleep(0.05)
