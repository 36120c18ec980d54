"""Numbers that are not finite: the step is skipped everywhere, its samples are named, a run that only skips ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from factories import episode
from mel_kernels import LossConfig
from support import make_model, random_samples, torchrun
from test_learner import learner
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mel_fast.distributed import World
from mel_fast.dumps import dump_episodes, read_jsonl
from mel_fast.guard import LEAST, Outcome, Spikes, hardest, pulls
from mel_fast.learner import Learner
from mel_fast.packing import collate
from mel_fast.train import main
from mel_fast.types import Sample

SCRIPT = str(Path(__file__).parent / "ranks" / "faults.py")
POISON = 399
"""A token whose embedding is NaN; `random_samples(POISON)` has none of it."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A model that is sound until it reads one token. Its head is not its embedding."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = make_model(len(tokenizer), tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = math.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clean(seed: int = 0) -> list[Sample]:
    samples = random_samples(POISON, seed=seed, count=12)
    for index, sample in enumerate(samples):
        sample.origin = f"p{index}"
    return samples


def spoilt(place: str, index: int = 3) -> list[Sample]:
    """The samples of a step, one of which has a number that is not finite."""
    samples = clean()
    sample = samples[index]
    carries_loss = np.flatnonzero(sample.stream)
    if place == "context":
        sample.ids[0] = POISON
    elif place == "a row without weight":  # the kernels never see it, the gradients of the blocks do
        sample.ids[carries_loss[1]] = POISON
        sample.weight[carries_loss[1] + 1 :] = 0
    elif place == "the last token":  # predicted, but predicting nothing
        sample.ids[-1] = POISON
    elif place == "advantage":
        sample.advantage[carries_loss[0]] = math.inf
    elif place == "weight":
        sample.weight[carries_loss[0]] = math.nan
    return samples


def state(trained: Learner) -> list[torch.Tensor]:
    moments = [value for s in trained.optimizer.state.values() for value in s.values()]
    return [tensor.detach().clone() for tensor in (*trained.policy.parameters(), *moments)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", ["context", "a row without weight", "the last token", "advantage", "weight"])
def test_a_step_that_is_not_finite_is_skipped_and_its_sample_named(poisoned: Path, world: World, place: str) -> None:
    trained, spared = learner(poisoned, world), learner(poisoned, world)
    for one in (trained, spared):
        one.update([clean(1)], LossConfig())
    before = state(trained)
    metrics = trained.update([spoilt(place)], LossConfig())
    same(state(trained), before)
    assert all(parameter.grad is None for parameter in trained.policy.parameters())
    assert metrics["optim/skipped_updates"] == 1
    assert metrics["optim/updates"] == 1
    assert not math.isfinite(metrics["optim/grad_norm"])
    assert metrics["rows/policy"] > 0
    assert trained.outcomes[0].to_blame() == [3]
    for one in (trained, spared):
        metrics = one.update([clean(2)], LossConfig())
        assert metrics["optim/skipped_updates"] == 0
    same(state(trained), state(spared))
    assert trained.skipped_in_row == 0


def test_a_metric_alone_that_is_not_finite_skips_nothing(poisoned: Path, world: World) -> None:
    """The engine's log-prob is only compared with, unless the importance weight is made of it."""
    samples = clean()
    samples[3].rollout_logp[:] = math.nan
    metrics = learner(poisoned, world).update([samples], LossConfig())
    assert math.isnan(metrics["policy/rollout_gap"])
    assert math.isfinite(metrics["loss/total"])
    assert metrics["optim/skipped_updates"] == 0
    weighted = learner(poisoned, world)
    assert weighted.update([samples], LossConfig(tis_cap=2.0))["optim/skipped_updates"] == 1
    assert weighted.outcomes[0].to_blame() == [3]


def test_of_several_updates_only_the_broken_one_is_skipped(poisoned: Path, world: World) -> None:
    trained = learner(poisoned, world, epochs=2)
    metrics = trained.update([clean(1), spoilt("context"), clean(2)], LossConfig())
    assert metrics["optim/skipped_updates"] == 2
    assert metrics["optim/updates"] == 4
    assert [outcome.finite for outcome in trained.outcomes] == [True, False, True] * 2
    assert not trained.stuck


def test_weights_that_are_not_finite_are_every_samples_fault(poisoned: Path, world: World) -> None:
    trained = learner(poisoned, world, max_skipped=2)
    with torch.no_grad():
        trained.policy.model.lm_head.weight[7, 0] = math.inf
    trained.update([clean()], LossConfig())
    assert trained.outcomes[0].to_blame() == list(range(12))
    assert not trained.stuck
    trained.update([clean()], LossConfig())
    assert trained.stuck


def test_a_loss_without_a_gradient_that_shows_it_blames_its_micro_batch() -> None:
    batch = collate(clean()[:3])
    finite = torch.ones(batch.tokens)
    assert pulls(batch, finite, torch.tensor(1.0)).isfinite().all()
    assert not pulls(batch, finite, torch.tensor(math.inf)).isfinite().any()
    finite[0] = math.nan
    assert pulls(batch, finite, torch.tensor(math.nan)).isfinite().tolist() == [False, True, True]


@pytest.fixture(scope="module")
def two_ranks(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw of ranks/faults.py."""
    out = tmp_path_factory.mktemp("faults")
    done = torchrun(2, SCRIPT, str(poisoned), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_rank_skips_with_the_one_whose_numbers_are_broken(two_ranks: list[dict[str, Any]]) -> None:
    assert sum(one["has the poison"] for one in two_ranks) == 1
    for one in two_ranks:
        assert one["metrics"]["optim/skipped_updates"] == 1
        assert one["metrics"]["policy/rollout_gap_max"] == math.inf
        assert one["blamed"] == [3]
        assert one["untouched"]
        assert one["as if it had not been"]


def test_ranks_agree_on_a_checkpoint_that_one_cannot_write_and_on_one_that_is_damaged(
    two_ranks: list[dict[str, Any]],
) -> None:
    for one in two_ranks:
        assert "step_000002: the checkpoint cannot be written: rank 1: " in one["told"]
        assert "step_000001 is untouched" in one["told"]
        assert one["left"] == ["step_000001"]
        assert one["sound"] == ["step_000002", "step_000001"]


def train_on_dumps(model: Path, folder: Path, broken: list[int], steps: int, leap: int = 0) -> list[str]:
    """Arguments of a run that trains on dumped rollouts of two prompts a step; at the leap one reward is far off."""
    (folder / "dumps").mkdir()
    for step in range(1, steps + 1):
        made = [episode([0, 1], [6, 9], id=f"p{step}a"), episode([1, 0, 0], [4, 5, 7], id=f"p{step}b")]
        if step in broken:
            made[1].trajectories[0].output_ids[2] = POISON
        if step == leap:
            made[0].trajectories[1].reward = 100.0
        dump_episodes(folder / "dumps" / f"step_{step:06d}.jsonl", made)
    config = {
        "run": {"mode": "train", "rollouts": str(folder / "dumps"), "steps": steps, "folder": str(folder / "runs")}
        | {"checkpoint_every": 0},
        "model": {"path": str(model)},
        "data": {"train": [{"path": "unused.jsonl"}]},
        "objective": {"normalise_std": False},
        "optim": {"token_budget": 16},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(folder / "run.yaml")]


def test_a_run_that_only_skips_ends_on_all_ranks_and_names_the_samples(
    poisoned: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    done = torchrun(2, "-m", "mel_fast.train", *train_on_dumps(poisoned, tmp_path, [2, 3, 4], 5))
    assert done.returncode != 0
    run = (tmp_path / "runs" / "latest").resolve()
    file = run / "skipped" / "step_000004.jsonl"
    said = [line for line in done.stderr.splitlines() if "3 optimizer steps in a row were skipped" in line]
    assert len(said) == 2, done.stderr[-3000:]  # each rank once
    assert sum(f"{file} has the samples" in line and "of the prompts p4b" in line for line in said) == 1
    rows = read_jsonl(file)
    assert {(row["step"], row["prompt"], row["kind"], row["pull"]) for row in rows} == {(4, "p4b", "policy", "nan")}
    assert all(POISON in row["ids"] and row["text"] == tokenizer.decode(row["ids"]) for row in rows)
    lines = read_jsonl(run / "metrics.jsonl")
    assert [(line["step"], line["optim/skipped_updates"]) for line in lines] == [(1, 0), (2, 1), (3, 1), (4, 1)]
    assert all(line["reward/correct"] == 0.4 and line["rows/policy"] > 0 for line in lines), "what was sampled is told"
    assert math.isnan(lines[-1]["loss/total"])


def test_skips_in_a_row_are_counted_on_after_a_resume(
    poisoned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_on_dumps(poisoned, tmp_path, [2, 3, 4, 5], 6)
    assert main([*arguments, "--run.steps=3", "--optim.max_skipped=4"]) == 0
    run = tmp_path / "runs" / "latest"
    exported = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert (run / "report.html").is_file()
    rest = ["--run.steps=6", "--optim.max_skipped=4"]
    assert main(["--resume", str(run), *rest]) == 2
    assert "step 5: 4 optimizer steps in a row were skipped" in capsys.readouterr().err
    assert sum(value.isnan().any().item() for value in exported.values()) == 1, "nothing spread from the one embedding"


def spike_lines() -> list[dict[str, float]]:
    random = np.random.default_rng(0)
    return [{"optim/grad_norm": float(v), "loss/total": float(v) / 10} for v in random.normal(1.0, 0.05, 60)]


def test_a_leap_is_told_from_the_usual_and_a_resumed_run_tells_the_same() -> None:
    lines = spike_lines()
    lines[40] |= {"optim/grad_norm": 9.0}
    lines[45] |= {"loss/total": math.nan, "optim/grad_norm": math.inf}  # skipped, not a leap; and not remembered
    whole = Spikes(10, 30, [])
    said = [whole.look(line) for line in lines]
    assert [step for step, words in enumerate(said) if words] == [40]
    assert said[40][0].startswith("optim/grad_norm 9, usually 0.99")
    for stop in (LEAST - 1, 40, 41, 50):
        resumed = Spikes(10, 30, json.loads(json.dumps(lines[:stop])))
        assert [resumed.look(line) for line in lines[stop:]] == said[stop:]


def test_the_leap_is_logged_with_its_prompt_before_and_after_a_resume(
    poisoned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "whole").mkdir()
    arguments = train_on_dumps(poisoned, tmp_path / "whole", [], 24, leap=23)
    assert main(arguments) == 0
    said = [record.message for record in caplog.records if "pull hardest" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 23: optim/grad_norm ")
    assert "prompts that pull hardest: p23a 100%, p23b 0%" in said[0]
    caplog.clear()
    assert main([*arguments, "--run.steps=22"]) == 0
    assert not any("pull hardest" in record.message for record in caplog.records)
    assert main(["--resume", str(tmp_path / "whole" / "runs" / "latest"), "--run.steps=24"]) == 0
    assert [record.message for record in caplog.records if "pull hardest" in record.message] == said


def test_steps_without_an_update_do_not_make_a_leap_of_the_next_one() -> None:
    lines = [{"optim/grad_norm": 0.2 + 0.01 * (step % 3) if step % 4 == 0 else 0.0} for step in range(200)]
    spikes = Spikes(10, 50, lines)
    assert spikes.look({"optim/grad_norm": 0.22}) == []
    assert spikes.look({"optim/grad_norm": 2.0}) != []


def test_steps_that_are_all_alike_do_not_make_a_leap_of_noise() -> None:
    spikes = Spikes(10, 30, [{"loss/total": 1.0}] * 30)
    assert spikes.look({"loss/total": 1.01}) == []
    assert spikes.look({"loss/total": 2.5}) != []


def test_the_prompt_that_pulls_hardest_is_named(poisoned: Path, world: World) -> None:
    samples = clean()
    samples[6].advantage *= 50
    trained = learner(poisoned, world)
    trained.update([samples], LossConfig())
    assert hardest(trained.outcomes, 2).startswith("p6 9")
    assert hardest([Outcome(clean()[:1], [0.0], 0.0)]) == "p0 0%"
