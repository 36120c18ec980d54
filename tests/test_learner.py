"""Updates do not depend on how samples are cut into micro-batches or spread over ranks (real processes, gloo)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mel_kernels import LossConfig
from support import make_model, random_samples, torchrun
from transformers import PreTrainedTokenizerBase

from mel_fast.distributed import World
from mel_fast.errors import InputError
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.policy import load_policy

SCRIPT = str(Path(__file__).parent / "ranks" / "updates.py")
COMPARED = (
    "loss/total",
    "loss/policy",
    "loss/nll",
    "optim/grad_norm",
    "grad/head_policy",
    "grad/head_nll",
    "policy/entropy",
)


def updates(ranks: int, model: Path, out: Path, *options: str) -> list[dict[str, float]]:
    result = torchrun(ranks, SCRIPT, str(model), str(out), *options)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


def assert_same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 1e-6) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), f"step {step}: {name}"


def learner(model: Path, world: World, **settings: float) -> Learner:
    config = OptimConfig.model_validate({"lr": 1e-3, "token_budget": 100} | settings)
    return Learner(load_policy(ModelConfig(path=str(model)), world), None, config, 4, world)


@pytest.mark.parametrize("kl", ["0", "0.1"])
def test_one_rank_equals_two_ranks(model_folder: Path, tmp_path: Path, kl: str) -> None:
    one = updates(1, model_folder, tmp_path / "one.json", "--kl", kl)
    two = updates(2, model_folder, tmp_path / "two.json", "--kl", kl)
    assert_same_curve(one, two)
    assert one[0]["loss/total"] != one[1]["loss/total"]


SETTINGS = {
    "checkpointing": {"checkpointing": "full"},
    "selective checkpointing": {"checkpointing": "selective"},
    "offload": {"offload": True},
    "weights stay gathered": {"reshard_after_forward": False},
    "all of it": {"checkpointing": "selective", "offload": True, "reshard_after_forward": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_no_way_of_saving_memory_changes_the_curve_on_two_ranks(
    model_folder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    plain = updates(1, model_folder, tmp_path / "plain.json")
    saving = updates(2, model_folder, tmp_path / "saving.json", "--settings", json.dumps(settings))
    assert_same_curve(saving, plain)


def test_a_head_of_its_own_is_trained_alike_on_two_ranks(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    make_model(len(tokenizer), tied=False).save_pretrained(tmp_path / "model")
    one, two = (updates(ranks, tmp_path / "model", tmp_path / "m.json") for ranks in (1, 2))
    assert_same_curve(one, two)


@pytest.mark.parametrize("settings", [{"offload": True}, {"dtype": "bfloat16", "offload": True}])
def test_offloading_changes_no_bit_of_one_ranks_curve(
    model_folder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    with_and_without = [
        updates(1, model_folder, tmp_path / "m.json", "--settings", json.dumps(settings | {"offload": offload}))
        for offload in (True, False)
    ]
    assert_same_curve(*with_and_without, tolerance=0)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_bit_of_the_curve(model_folder: Path, world: World, mode: str) -> None:
    curves = []
    for checkpointing in ("none", mode):
        model = ModelConfig.model_validate({"path": str(model_folder), "checkpointing": checkpointing})
        trained = Learner(load_policy(model, world), None, OptimConfig(lr=1e-3, token_budget=100), 4, world)
        curves.append([trained.update([random_samples(400, seed=step)], LossConfig()) for step in range(3)])
    assert_same_curve(curves[0], curves[1], tolerance=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize(("mode", "ranks"), [("none", 1), ("full", 1), ("selective", 2)])
def test_compiled_blocks_train_alike_and_are_compiled_a_few_times_only(
    model_folder: Path, tmp_path: Path, mode: str, ranks: int
) -> None:
    """The curve, each step with another number of tokens and sequences."""
    steps = ("--steps", "0", "8")
    eager = updates(1, model_folder, tmp_path / "eager.json", *steps)
    settings = json.dumps({"compile": True, "checkpointing": mode})
    compiled = updates(ranks, model_folder, tmp_path / "compiled.json", *steps, "--settings", settings)
    assert_same_curve(compiled, eager, tolerance=1e-4)
    # With and without gradients (the old log-probs of step 2), and a micro-batch of a single sequence.
    assert 1 <= compiled[2]["test/graphs"] <= 3
    assert compiled[-1]["test/graphs"] == compiled[2]["test/graphs"], "it goes on compiling"


def test_micro_batching_changes_nothing(model_folder: Path, world: World) -> None:
    curves = []
    for budget in (40, 150, 100_000):
        trained = learner(model_folder, world, token_budget=budget)
        curves.append([trained.update([random_samples(400, seed=step)], LossConfig()) for step in range(3)])
    assert_same_curve(curves[0], curves[2])
    assert_same_curve(curves[1], curves[2])


def test_the_order_of_samples_changes_nothing(model_folder: Path, world: World) -> None:
    samples = random_samples(400)
    forth, back = (learner(model_folder, world).update([order], LossConfig()) for order in (samples, samples[::-1]))
    assert_same_curve([forth], [back])


def test_on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped(model_folder: Path, world: World) -> None:
    trained = learner(model_folder, world)
    for step in range(3):
        metrics = trained.update([random_samples(400, seed=step)], LossConfig())
        assert metrics["policy/ratio"] == metrics["policy/ratio_max"] == 1.0
        assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0.0


def test_later_updates_of_a_batch_are_measured_against_its_first(model_folder: Path, world: World) -> None:
    """Old log-probs are taken once, before the first step: with a second epoch the ratio must leave 1."""
    samples = random_samples(400)
    once = learner(model_folder, world, lr=0.02).update([samples], LossConfig())
    twice = learner(model_folder, world, lr=0.02, epochs=2).update([samples], LossConfig())
    assert once["policy/ratio_max"] == 1.0
    assert twice["policy/ratio_max"] > 1.05
    assert twice["policy/clip_low"] + twice["policy/clip_high"] > 0
    assert twice["optim/updates"] == 2


def test_every_mini_batch_is_one_optimizer_step(model_folder: Path, world: World) -> None:
    samples = random_samples(400, count=12)
    metrics = learner(model_folder, world).update([samples[:4], samples[4:8], samples[8:]], LossConfig())
    assert metrics["optim/updates"] == 3


def test_a_batch_without_samples_steps_nothing(model_folder: Path, world: World) -> None:
    trained = learner(model_folder, world)
    before = [p.clone() for p in trained.policy.parameters()]
    metrics = trained.update([[]], LossConfig())
    assert metrics["optim/updates"] == 0
    torch.testing.assert_close(before, list(trained.policy.parameters()), atol=0, rtol=0)


def test_the_nll_of_what_is_trained_on_falls(model_folder: Path, world: World) -> None:
    samples = [sample for sample in random_samples(400) if sample.kind == "retrospective"]
    trained = learner(model_folder, world)
    curve = [trained.update([samples], LossConfig())["nll/retrospective"] for _ in range(15)]
    assert curve[-1] < 0.7 * curve[0]


def test_a_gradient_budget_drops_no_more_than_it_may_and_says_how_much(model_folder: Path, world: World) -> None:
    model = ModelConfig(path=str(model_folder), gradient_budget=0.2)
    trained = Learner(load_policy(model, world), None, OptimConfig(lr=1e-3, token_budget=100), 4, world)
    exact, budgeted = (
        one.update([random_samples(400)], LossConfig()) for one in (learner(model_folder, world), trained)
    )
    assert budgeted["loss/total"] == exact["loss/total"]
    assert 0 < budgeted["budget/rows"] < 1
    assert 0 < budgeted["budget/gradient"] <= 0.2
    assert budgeted["optim/grad_norm"] == pytest.approx(exact["optim/grad_norm"], rel=0.2)
    assert budgeted["optim/grad_norm"] != exact["optim/grad_norm"]
    assert not any(name.startswith("budget/") for name in exact)


def test_gradients_are_clipped_to_the_norm(model_folder: Path, world: World) -> None:
    metrics = learner(model_folder, world, max_grad_norm=1e-4).update([random_samples(400)], LossConfig())
    assert metrics["optim/grad_norm"] > 1e-4
    assert metrics["optim/grad_clipped"] == 1.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"warmup_steps": 4}, [0.25, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.5, 0.0]),
        ({"schedule": "cosine", "final_lr_ratio": 0.2}, [1.0, 0.6, 0.2]),
    ],
)
def test_learning_rate_schedules(settings: dict[str, object], expected: list[float]) -> None:
    config = OptimConfig.model_validate({"lr": 1.0} | settings)
    assert [config.lr_at(update, 10) for update in (0, 5, 10)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fails", "budget", "expected"),
    [
        ("forward", 100, r"rank 0 ran out of device memory in the forward with a micro-batch of \d+ tokens .*"
         r"optim\.token_budget=100, model\.checkpointing=none, .*1\. lower optim\.token_budget to \d+, .*"
         r"2\. set model\.checkpointing=full; 3\. set model\.offload=true; .*tried to allocate 2 GiB"),
        ("forward", 5, r"one sample alone has \d+ tokens: lower rollout\.max_new_tokens"),
        ("backward", 100, "in the backward with a micro-batch"),
        ("step", 100, r"in the optimizer's step \(.*1\. set model\.offload=true"),
    ],
)  # fmt: skip
def test_too_little_memory_is_one_error_that_says_what_to_change(
    model_folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, fails: str, budget: int, expected: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nmore details")

    trained = learner(model_folder, world, token_budget=budget)
    owner = {"forward": trained.policy, "backward": torch.Tensor, "step": trained.optimizer}[fails]
    monkeypatch.setattr(owner, fails, fail)
    with pytest.raises(InputError, match=expected) as error:
        trained.update([random_samples(400)], LossConfig())
    assert "\n" not in str(error.value)
