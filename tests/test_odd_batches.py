"""Steps with next to nothing to learn from: on one rank and on two the run goes on, and its counters are right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from factories import episode, experience
from support import torchrun

from mel_fast.dumps import dump_episodes, read_jsonl
from mel_fast.train import main
from mel_fast.types import Episode

BUDGET = 16


def truncated() -> Episode:
    made = episode([0, 1])
    for one in made.trajectories:
        one.finish_reason = "length"
    return made


def long_context() -> Episode:
    made = episode([0, 1])
    for one in made.trajectories:
        one.prompt_ids = list(range(1, 2 * BUDGET))
    return made


NOTHING: dict[str, float] = {"batch/samples": 0, "taken": 0}
STEPS: list[tuple[str, list[Episode], dict[str, float]]] = [
    ("all right", [episode([1, 1]), episode([1, 1])], {"groups/all_right": 2, "reward/correct": 1} | NOTHING),
    ("all wrong", [episode([0, 0]), episode([0, 0])], {"groups/all_wrong": 2, "reward/correct": 0} | NOTHING),
    ("all truncated", [truncated()], {"response/truncated": 1, "batch/samples": 2, "rows/policy": 4, "taken": 1}),
    ("no token", [episode([0, 1], [0, 0])], {"response/length_max": 0, "batch/policy_tokens": 0} | NOTHING),
    ("one without a token", [episode([0, 1], [0, 3])], {"batch/samples": 1, "rows/policy": 3, "taken": 1}),
    ("the stop token alone", [episode([0, 1], [1, 1])], {"response/length_mean": 1, "rows/policy": 2, "taken": 1}),
    (
        "no experience kept",
        [episode([0, 1], experiences=[experience(kept=False)])],
        {"mel/pairs": 1, "mel/kept": 0, "mel/retention": 0, "rows/nll": 0, "rows/policy": 4, "taken": 1},
    ),
    ("no prompt", [], {"groups/all": 0, "reward/mean": 0, "balance/padding_share": math.nan} | NOTHING),
    ("one sample", [episode([0, 1], [2, 0])], {"batch/samples": 1, "rows/policy": 2, "taken": 1}),
    ("longer than the budget", [long_context()], {"batch/tokens": 2 * (2 * BUDGET - 1 + 2), "taken": 1}),
    ("an empty mini-batch", [episode([1, 1]), episode([0, 1])], {"batch/samples": 2, "groups/mixed": 1, "taken": 1}),
    ("two mini-batches", [episode([0, 1]), episode([0, 1])], {"batch/samples": 4, "taken": 2}),
]


def arguments(model: Path, folder: Path) -> list[str]:
    """A run with a step of each kind, out of dumps."""
    folder.mkdir()
    for number, (_, episodes, _) in enumerate(STEPS, 1):
        dump_episodes(folder / f"step_{number:06d}.jsonl", episodes)
    config = {
        "run": {"mode": "train", "rollouts": str(folder), "steps": len(STEPS), "folder": str(folder / "runs")}
        | {"checkpoint_every": 0},
        "model": {"path": str(model)},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "objective": {"updates_per_batch": 2},
        "optim": {"token_budget": BUDGET},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "run.yaml")]


@pytest.fixture(scope="module")
def lines(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, float]]]:
    """The metrics, by the number of ranks."""
    one, two = (tmp_path_factory.mktemp("odd") / name for name in ("one", "two"))
    assert main(arguments(model_folder, one)) == 0
    done = torchrun(2, "-m", "mel_fast.train", *arguments(model_folder, two))
    assert done.returncode == 0, done.stderr[-3000:]
    return {ranks: read_jsonl(folder / "runs" / "latest" / "metrics.jsonl") for ranks, folder in ((1, one), (2, two))}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", range(len(STEPS)), ids=[name for name, _, _ in STEPS])
def test_its_counters_are_right_and_all_is_finite(
    lines: dict[int, list[dict[str, float]]], ranks: int, kind: int
) -> None:
    line, before = lines[ranks][kind], lines[ranks][kind - 1]["optim/updates"] if kind else 0
    assert [name for name, value in line.items() if not math.isfinite(value)] == []
    seen = line | {"taken": line["optim/updates"] - before}
    expected = STEPS[kind][2]
    assert {name: seen.get(name, math.nan) for name in expected} == pytest.approx(expected, nan_ok=True)
    assert line["optim/skipped_updates"] == 0
    if not expected["taken"]:
        assert "loss/total" not in line
        assert line["optim/grad_norm"] == 0


def test_two_ranks_see_what_one_sees(lines: dict[int, list[dict[str, float]]]) -> None:
    assert len(lines[1]) == len(lines[2]) == len(STEPS)
    for one, two in zip(lines[1], lines[2], strict=True):
        names = [name for name in one if not name.startswith(("time/", "perf/", "balance/"))]
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-5)


def test_another_tokenizers_rollouts_are_an_error(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = arguments(model_folder, tmp_path / "foreign")
    foreign = episode([0, 1])
    foreign.trajectories[1].output_ids[0] = 150_000
    dump_episodes(tmp_path / "foreign" / "step_000001.jsonl", [foreign])
    assert main(run) == 2
    assert "step_000001.jsonl, line 1: not an episode as dumped (trajectories.1: token id 150000" in " ".join(
        capsys.readouterr().err.split()
    )
