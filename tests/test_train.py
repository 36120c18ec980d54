"""The whole loop, as a user runs it, in the embedded world, whose warm start is built once and cached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support import torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from mel_fast.dumps import load_episodes, read_jsonl
from mel_fast.evaluate import main as evaluate_main
from mel_fast.train import main

STEPS = 8
COMMON = (
    "--run.checkpoint_every=3",
    "--eval.every=4",
    "--eval.samples=2",
    "--eval.sets=[{path: '{tiny}/heldout.jsonl'}]",
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_world")]


def metrics(run: Path) -> list[dict[str, float]]:
    """What must repeat: everything but wall times."""
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "perf/"))}
        for line in read_jsonl(run / "metrics.jsonl")
    ]


def steps_of(run: Path) -> list[dict[str, float]]:
    return [line for line in metrics(run) if "loss/total" in line]


def train(folder: Path, *options: str, steps: int = STEPS) -> Path:
    """In this process; returns the run directory."""
    status = main([f"--run.folder={folder}", f"--run.steps={steps}", *COMMON, *options])
    assert status == 0
    return (folder / "latest").resolve()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank, by torchrun."""
    folder = tmp_path_factory.mktemp("whole")
    result = torchrun(1, "-m", "mel_fast.train", f"--run.folder={folder}", f"--run.steps={STEPS}", *COMMON)
    assert result.returncode == 0, result.stderr[-3000:]
    return (folder / "latest").resolve()


def test_a_run_learns_and_leaves_everything_behind(whole: Path) -> None:
    steps = steps_of(whole)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert sum(line["mel/kept"] > 0 for line in steps) > STEPS / 2
    assert all(line["policy/ratio_max"] == 1.0 and line["policy/clip_low"] == 0.0 for line in steps), "on-policy"
    assert all(line["policy/rollout_gap"] < 1e-4 for line in steps)
    scores = {
        line["step"]: line["eval/heldout/pass_at_1"] for line in metrics(whole) if "eval/heldout/pass_at_1" in line
    }
    assert sorted(scores) == [0, 4, STEPS]
    assert scores[STEPS] > scores[0] + 0.1
    assert (whole / "report.html").stat().st_size > 10_000
    assert len(load_episodes(whole / "rollouts" / "step_000001.jsonl")) == 16
    assert [path.name for path in sorted((whole / "checkpoints").glob("step_*"))] == ["step_000006", "step_000008"]


def test_the_final_policy_solves_problems_in_plain_transformers(whole: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(whole / "model")
    greedy = [row for row in read_jsonl(whole / "evaluations" / f"step_{STEPS:06d}.jsonl") if row["temperature"] == 0]
    episodes = load_episodes(whole / "rollouts" / "step_000001.jsonl")
    inputs = torch.tensor([episodes[0].trajectories[0].prompt_ids])
    answer = tokenizer.decode(model.generate(inputs, max_new_tokens=40, do_sample=False)[0, inputs.shape[1] :])
    assert "\\boxed{" in answer
    assert all("\\boxed{" in row["text"] for row in greedy[:5])


def test_killed_and_resumed_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    options = [f"--run.folder={tmp_path}", f"--run.steps={STEPS}", *COMMON]
    process = subprocess.Popen(
        [sys.executable, "-m", "mel_fast.train", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = tmp_path / "latest"
    while not (run / "metrics.jsonl").exists() or len(steps_of(run)) < 5:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 5 <= len(steps_of(run)) < STEPS
    resumed = torchrun(1, "-m", "mel_fast.train", "--resume", str(run))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on after step 3" in resumed.stdout
    assert metrics(run.resolve()) == metrics(whole)


def test_two_ranks_train_as_one(whole: Path, tmp_path: Path) -> None:
    result = torchrun(
        2, "-m", "mel_fast.train", f"--run.folder={tmp_path}", "--run.steps=3", *COMMON, "--eval.at_ends=false"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for one, two in zip(steps_of(whole), steps_of(tmp_path / "latest"), strict=False):
        for name in ("loss/total", "loss/policy", "loss/nll", "optim/grad_norm", "reward/mean", "nll/retrospective"):
            assert two[name] == pytest.approx(one[name], abs=1e-6, rel=1e-6), f"step {one['step']}: {name}"


def test_rollouts_alone_and_training_from_them_alone_make_the_same_step(whole: Path, tmp_path: Path) -> None:
    sampled = train(tmp_path / "a", "--run.mode=rollout", "--eval.at_ends=false", steps=1)
    assert not (sampled / "model").exists()
    latest = tmp_path / "a" / "latest" / "rollouts"  # through a link that the new run moves
    trained = train(tmp_path / "a", "--run.mode=train", f"--run.rollouts={latest}", steps=1)
    assert trained != sampled
    ours, theirs = steps_of(trained)[0], steps_of(whole)[0]
    for name in ("loss/total", "optim/grad_norm", "reward/mean", "mel/kept", "batch/tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


@pytest.mark.parametrize("mel", [True, False], ids=["with MEL", "without"])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "rloo", "reinforce++", "rft"])
def test_every_algorithm_runs_with_and_without_meta_experience(tmp_path: Path, algorithm: str, mel: bool) -> None:
    run = train(
        tmp_path,
        f"--objective.algorithm={algorithm}",
        f"--mel.enabled={str(mel).lower()}",
        "--mel.internalise={retrospective: 1.0, heuristic: 0.5, replay: 0.5}",
        "--eval.at_ends=false",
        "--eval.every=0",
        steps=1,
    )
    line = steps_of(run)[0]
    assert line["optim/grad_norm"] > 0
    assert ("nll/rft" in line) == (algorithm == "rft")
    assert ("policy/ratio" in line) == (algorithm != "rft")
    for kind in ("retrospective", "heuristic", "replay"):
        assert (f"nll/{kind}" in line) == mel


def test_evaluation_by_itself(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m mel_fast.evaluate` on the final policy gives the run's last scores."""
    monkeypatch.chdir(tmp_path)
    assert evaluate_main(["--config", str(whole / "config.yaml"), f"--model.path={whole / 'model'}"]) == 0
    by_hand = read_jsonl(tmp_path / "evaluation.jsonl")
    in_run = read_jsonl(whole / "evaluations" / f"step_{STEPS:06d}.jsonl")
    assert [row["text"] for row in by_hand] == [row["text"] for row in in_run]


def test_several_updates_per_batch_with_a_kl_term(tmp_path: Path) -> None:
    options = ("--objective.updates_per_batch=4", "--objective.kl_coef=0.1", "--optim.lr=3e-3", "--eval.at_ends=false")
    line = steps_of(train(tmp_path, *options, "--eval.every=0", steps=1))[0]
    assert line["optim/updates"] == 4
    assert line["policy/ratio_max"] > 1.0
    assert line["policy/kl"] > 0


def write(path: Path, *rows: str) -> Path:
    path.write_text("".join(row + "\n" for row in rows))
    return path


GOOD = json.dumps({"question": "What is 1 plus 1?", "answer": "2"})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([GOOD, '{"question": '], [], "train.jsonl:2"),
        ([], [], "holds no rows"),
        ([json.dumps({"question": "What?"})], [], "answer"),
        ([json.dumps({"question": "word " * 300, "answer": "1"})], [], "over the limit of 192"),
        ([GOOD], ["--rollout.max_new_tokens=600"], "rollout.max_new_tokens=600 leaves no room"),
        ([GOOD], ["--model.path=/nowhere"], "model.path='/nowhere'"),
        ([GOOD], ["--optim.lrr=1"], "did you mean 'optim.lr'?"),
        ([GOOD], ["--resume", "/nowhere"], "no such"),
        ([GOOD], ["--run.device=cuda"], "no CUDA device"),
    ],
    ids=[
        "bad line",
        "empty",
        "missing field",
        "long prompt",
        "long response",
        "model",
        "unknown key",
        "resume",
        "device",
    ],
)
def test_bad_input_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], options: list[str], message: str
) -> None:
    if "device" in message and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    data = write(tmp_path / "train.jsonl", *rows)
    status = main(
        [
            f"--run.folder={tmp_path / 'runs'}",
            f"--data.train=[{{path: {data}}}]",
            "--config",
            "configs/tiny.yaml",
            *options,
        ]
    )
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "runs").exists(), "a run that cannot start leaves nothing behind"
