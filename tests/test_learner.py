"""Updates do not depend on how samples are cut into micro-batches or spread over ranks (real processes, gloo)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from curves import Case, Curve, assert_same_curve, on_ranks, train
from mel_kernels import LossConfig
from support import make_model, random_samples
from transformers import PreTrainedTokenizerBase

from mel_fast.distributed import World, join_world, leave
from mel_fast.errors import InputError
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.policy import load_policy


def learner(model: Path, world: World, **settings: float) -> Learner:
    config = OptimConfig.model_validate({"lr": 1e-3, "token_budget": 100} | settings)
    return Learner(load_policy(ModelConfig(path=str(model)), world), None, config, 4, world)


SAVINGS = {
    "full checkpointing": {"checkpointing": "full"},
    "selective checkpointing": {"checkpointing": "selective"},
    "offload": {"offload": True},
    "weights stay gathered": {"reshard_after_forward": False},
    "all of it": {"checkpointing": "selective", "offload": True, "reshard_after_forward": False},
}


@pytest.fixture(scope="module")
def models(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """A checkpoint of each family, and one whose head is not its embedding."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen2", "llama"):
        make_model(len(tokenizer), family=family).save_pretrained(folder / family)
    make_model(len(tokenizer), tied=False).save_pretrained(folder / "untied")
    return {"qwen3": str(model_folder)} | {name: str(folder / name) for name in ("qwen2", "llama", "untied")}


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Every curve of this file that needs two ranks."""
    cases = {name: Case(model) for name, model in models.items()} | {"kl": Case(models["qwen3"], kl=0.1)}
    cases |= {name: Case(models["qwen3"], settings) for name, settings in SAVINGS.items()}
    cases["alone"] = Case(models["qwen3"], optim={"nll_lr": 2e-3, "nll_epochs": 2})
    cases["terms"] = Case(models["qwen3"], optim={"term_gradients": True})
    return on_ranks(2, cases, tmp_path_factory.mktemp("curves") / "two.json")


@pytest.mark.parametrize("model", ["qwen3", "qwen2", "llama", "untied"])
def test_one_rank_equals_two_ranks(
    models: dict[str, str], two_ranks: dict[str, Curve], world: World, model: str
) -> None:
    one = train(Case(models[model]), world)
    assert_same_curve(two_ranks[model], one)
    assert one[0]["loss/total"] != one[1]["loss/total"]


def test_one_rank_equals_two_ranks_with_a_reference(
    models: dict[str, str], two_ranks: dict[str, Curve], world: World
) -> None:
    one = train(Case(models["qwen3"], kl=0.1), world)
    assert_same_curve(two_ranks["kl"], one)
    assert one[-1]["policy/kl"] > 0


def test_the_gradients_of_the_terms_are_those_of_one_rank(
    models: dict[str, str], two_ranks: dict[str, Curve], world: World
) -> None:
    one = train(Case(models["qwen3"], optim={"term_gradients": True}), world)
    assert_same_curve(two_ranks["terms"], one, names=("grad/policy", "grad/nll", "grad/cosine", "optim/grad_norm"))


def test_steps_of_the_nlls_own_are_those_of_one_rank(
    models: dict[str, str], two_ranks: dict[str, Curve], world: World
) -> None:
    one = train(Case(models["qwen3"], optim={"nll_lr": 2e-3, "nll_epochs": 2}), world)
    assert_same_curve(two_ranks["alone"], one)


def test_with_steps_of_its_own_the_nll_leaves_the_surrogates_step_as_it_is(model_folder: Path, world: World) -> None:
    """Its own moments and clipping: the surrogate moves the policy as if it were alone, the NLL as if it came after."""
    samples = random_samples(400)
    both = learner(model_folder, world, nll_lr=2e-3, nll_epochs=3)
    both.update([samples], LossConfig())
    first = learner(model_folder, world)
    first.update([[s for s in samples if s.kind == "policy"]], LossConfig())
    second = learner(model_folder, world, lr=2e-3)
    second.policy = first.policy
    second.optimizer = torch.optim.AdamW(first.policy.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(3):
        second.update([[s for s in samples if s.kind == "retrospective"]], LossConfig())
    for ours, theirs in zip(both.policy.parameters(), first.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert both.updates_done == 1


@pytest.mark.parametrize("saving", SAVINGS)
def test_no_way_of_saving_memory_changes_the_curve_on_two_ranks(
    models: dict[str, str], two_ranks: dict[str, Curve], world: World, saving: str
) -> None:
    assert_same_curve(two_ranks[saving], train(Case(models["qwen3"]), world))


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_offloading_changes_no_bit_of_one_ranks_curve(model_folder: Path, settings: dict[str, object]) -> None:
    with join_world("cpu", 5) as world:  # sharding needs a process group
        with_and_without = [
            train(Case(str(model_folder), settings | {"offload": offload}), world) for offload in (True, False)
        ]
    leave()
    assert_same_curve(*with_and_without, tolerance=0)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_bit_of_the_curve(model_folder: Path, world: World, mode: str) -> None:
    curves = []
    for checkpointing in ("none", mode):
        model = ModelConfig.model_validate({"path": str(model_folder), "checkpointing": checkpointing})
        trained = Learner(load_policy(model, world), None, OptimConfig(lr=1e-3, token_budget=100), 4, world)
        curves.append([trained.update([random_samples(400, seed=step)], LossConfig()) for step in range(3)])
    assert_same_curve(curves[0], curves[1], tolerance=0)


def test_compiled_blocks_train_alike_and_are_compiled_a_few_times_only(
    model_folder: Path, tmp_path: Path, world: World
) -> None:
    """Each step with another number of tokens and sequences. What torch.compile makes of the blocks is run operator by
    operator here; the next test generates code."""
    eager = Case(str(model_folder), steps=(0, 8), compiler="aot_eager")
    case = replace(eager, settings={"compile": True, "checkpointing": "full"})  # "selective": the next test
    compiled = on_ranks(2, {"full": case}, tmp_path / "compiled.json")["full"]
    assert_compiled(compiled, train(eager, world), "full")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_generated_code_trains_alike(model_folder: Path, world: World) -> None:
    eager = Case(str(model_folder), steps=(0, 8))
    compiled = train(replace(eager, settings={"compile": True, "checkpointing": "selective"}), world)
    assert_compiled(compiled, train(eager, world), "selective")


def assert_compiled(compiled: Curve, expected: Curve, mode: str) -> None:
    assert_same_curve(compiled, expected, tolerance=1e-4)
    # With and without gradients (the old log-probs of step 2), and a micro-batch of a single sequence.
    assert 1 <= compiled[2]["test/graphs"] <= 3, mode
    assert compiled[-1]["test/graphs"] == compiled[2]["test/graphs"], f"{mode}: it goes on compiling"


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
