"""The model path on a GPU: each faster way computes what the plain one does, and memory is what the planner says.

    make gpu-tests PYTHON=python3

Needs what wheels.txt lists besides torch, transformers and triton; without flash-attn or Liger their tests skip. These
tests have not been run yet: the bounds are what bf16 and float32 allow, not what was seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from mel_kernels import LossConfig
from transformers import AutoModelForCausalLM

from mel_fast.distributed import World, join_world
from mel_fast.errors import InputError
from mel_fast.learner import Learner, OptimConfig
from mel_fast.memory import Planner
from mel_fast.model import ModelConfig
from mel_fast.packing import collate
from mel_fast.policy import Policy, load_policy

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import FAMILIES, random_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY = 5000


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world("cuda", 5) as joined:
        yield joined


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each."""
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    for family, path in paths.items():
        save_model(path, family=family, **sizes)
    return paths


@pytest.fixture(scope="module")
def folder(families: dict[str, Path]) -> Path:
    return families["qwen3"]


def save_model(path: Path, vocabulary: int = VOCABULARY, family: str = "qwen3", **sizes: Any) -> None:
    torch.manual_seed(0)
    sizes |= {} if family == "qwen2" else {"head_dim": 64}  # Qwen2 divides the hidden size by the heads
    shape = FAMILIES[family](vocab_size=vocabulary, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3.0)  # else attention is nearly uniform, whatever the mask
    model.save_pretrained(path)


def settings(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(folder), "dtype": "bfloat16", "liger": False} | changes)


def batch_on(world: World, seed: int = 0) -> Any:
    return collate(random_samples(VOCABULARY, seed=seed, count=24, longest=300)).to(world.device)


def gradients(policy: Policy, world: World) -> dict[str, torch.Tensor]:
    policy(batch_on(world), LossConfig())[0].backward()
    found = {}
    for name, parameter in policy.named_parameters():
        grad = parameter.grad
        assert grad is not None
        found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def curve(config: ModelConfig, world: World, steps: int = 5) -> list[dict[str, float]]:
    learner = Learner(load_policy(config, world), None, OptimConfig(lr=1e-3, token_budget=2000), steps, world)
    return [
        learner.update([random_samples(VOCABULARY, seed=step, count=24, longest=300)], LossConfig())
        for step in range(steps)
    ]


def assert_same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in ("loss/nll", "policy/entropy", "optim/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tolerance), f"step {step}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["varlen", "flash"])
def test_packed_log_probs_in_bf16_are_as_exact_as_separate_ones(
    families: dict[str, Path], world: World, attention: str, family: str
) -> None:
    """Both against float32: packing may add no more than bf16 itself does."""
    folder = families[family]
    if attention == "flash":
        pytest.importorskip("flash_attn")
    batch = batch_on(world)
    with torch.no_grad():
        exact = load_policy(settings(folder, dtype="float32"), world)(batch, None)[1]
        separate = load_policy(settings(folder, attention="padded"), world)(batch, None)[1]
        packed = load_policy(settings(folder, attention=attention), world)(batch, None)[1]
    bf16 = (separate - exact).abs()
    assert exact.std() > 1, "weights too small to tell a wrong mask"
    assert (packed - exact).abs().mean() < 1.5 * bf16.mean()
    assert (packed - exact).abs().max() < 2.5 * bf16.max()


@pytest.mark.parametrize("attention", ["varlen", "flash"])
def test_a_sequence_does_not_see_its_neighbours(folder: Path, world: World, attention: str) -> None:
    if attention == "flash":
        pytest.importorskip("flash_attn")
    policy = load_policy(settings(folder, attention=attention), world)
    first, *others = random_samples(VOCABULARY, count=6, longest=300)
    with torch.no_grad():
        alone = policy(collate([first]).to(world.device), None)[1]
        after = policy(collate([*others, first]).to(world.device), None)[1][-len(alone) :]
    torch.testing.assert_close(after, alone, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("attention", ["varlen", "flash"])
def test_all_attentions_train_alike(folder: Path, world: World, attention: str) -> None:
    if attention == "flash":
        pytest.importorskip("flash_attn")
    packed, padded = (curve(settings(folder, attention=each), world) for each in (attention, "padded"))
    assert_same_curve(packed, padded, 3e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_liger_computes_what_the_model_does(
    families: dict[str, Path], world: World, dtype: str, tolerance: float, mode: str, family: str
) -> None:
    pytest.importorskip("liger_kernel")
    module, name = import_module(f"transformers.models.{family}.modeling_{family}"), family.capitalize()
    folder = families[family]
    plain = gradients(load_policy(settings(folder, dtype=dtype), world), world)
    kept = {each: getattr(module, each) for each in ("apply_rotary_pos_emb", f"{name}RMSNorm", f"{name}MLP")}
    try:
        fused = gradients(load_policy(settings(folder, dtype=dtype, liger=True, checkpointing=mode), world), world)
    finally:  # Liger changes transformers' module
        for each, value in kept.items():
            setattr(module, each, value)
    assert_same_gradients(fused, plain, tolerance)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_leaves_the_gradients(folder: Path, world: World, mode: str) -> None:
    """Within what the unordered sums of attention's backward leave."""
    plain = gradients(load_policy(settings(folder), world), world)
    recomputed = gradients(load_policy(settings(folder, checkpointing=mode), world), world)
    assert_same_gradients(recomputed, plain, 1e-2)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_train_like_eager_ones(folder: Path, world: World, mode: str) -> None:
    eager = curve(settings(folder), world)
    compiled = curve(settings(folder, compile=True, checkpointing=mode), world)
    assert_same_curve(compiled, eager, 3e-2)


def test_offloading_leaves_the_curve(folder: Path, world: World) -> None:
    assert_same_curve(curve(settings(folder, offload=True), world), curve(settings(folder), world), 1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_the_gpu_trains_like_the_cpu(folder: Path, world: World, dtype: str, tolerance: float) -> None:
    """Five updates: the CPU in float32, the GPU in either type."""
    on_cpu = curve(settings(folder, dtype="float32"), World(0, 1, torch.device("cpu")))
    assert_same_curve(curve(settings(folder, dtype=dtype), world), on_cpu, tolerance)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_the_predicted_peak_is_within_a_tenth(tmp_path: Path, world: World, vocabulary: int, mode: str) -> None:
    save_model(
        tmp_path,
        vocabulary,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=16,
    )
    config = settings(tmp_path, checkpointing=mode)
    policy = load_policy(config, world)
    samples = random_samples(VOCABULARY, count=16, longest=2000)
    batch = collate(samples)
    learner = Learner(policy, None, OptimConfig(token_budget=batch.tokens), 2, world)
    before = torch.cuda.memory_allocated() - sum(4 * p.numel() for p in policy.parameters())  # of other tests
    learner.update([samples], LossConfig())  # AdamW's moments appear in the first update, gradients stay from no update
    torch.cuda.reset_peak_memory_stats()
    learner.update([samples], LossConfig())
    measured = torch.cuda.max_memory_allocated() - before
    planner = Planner.of(config, policy.config, 1)
    # A single micro-batch: its gradients are not there before its backward.
    resident = sum(planner.resident().values()) - planner.resident()["gradients"]
    lower = resident + max(planner.moments(batch.tokens, len(batch.rows)).values())
    assert lower <= 1.1 * measured
    assert measured <= 1.1 * (lower + planner.resident()["gradients"])


def test_too_little_memory_is_one_error_that_says_what_to_change(folder: Path, world: World) -> None:
    policy = load_policy(settings(folder), world)
    learner = Learner(policy, None, OptimConfig(token_budget=10**6), 1, world)
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(world.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / whole)
    try:
        with pytest.raises(InputError, match=r"ran out of device memory .* 1\. lower optim\.token_budget"):
            learner.update([random_samples(VOCABULARY, count=400, longest=1000)], LossConfig())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
