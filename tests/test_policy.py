"""The packed forward is the plain forward, sequence by sequence; the joint loss is the textbook one in float64."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mel_kernels import LossConfig, Stream
from support import make_model, random_samples, torchrun
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.qwen3 import modeling_qwen3

from mel_fast.attention import choose_implementation
from mel_fast.blocks import fuse
from mel_fast.distributed import World
from mel_fast.errors import InputError
from mel_fast.gspo import SequenceLoss
from mel_fast.model import ModelConfig, load_model
from mel_fast.packing import PackedBatch, collate
from mel_fast.policy import Policy, load_policy
from mel_fast.types import Sample


@pytest.fixture
def policy(model_folder: Path, world: World) -> Policy:
    return load_policy(ModelConfig(path=str(model_folder)), world)


def separate_logps(model_folder: Path, samples: list[Sample]) -> list[torch.Tensor]:
    """Log-probs [L - 1] of each sample's tokens, one plain float64 forward per sequence."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    logps = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [L - 1, V]
        logps.append(torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).squeeze(1))
    return logps


def test_packed_log_probs_equal_those_of_separate_forwards(policy: Policy, model_folder: Path) -> None:
    samples = random_samples(policy.config.vocab_size)
    with torch.no_grad():
        _, packed, _, _ = policy(collate(samples), None)
    expected = torch.cat(
        [
            logps[torch.from_numpy(sample.stream[1:] != 0)]
            for sample, logps in zip(samples, separate_logps(model_folder, samples), strict=True)
        ]
    )
    assert expected.std() > 1, "weights too small to tell a wrong mask"
    torch.testing.assert_close(packed.double(), expected, atol=2e-5, rtol=0)


def test_a_sequence_does_not_see_its_neighbours(policy: Policy) -> None:
    first, *others = random_samples(policy.config.vocab_size)
    with torch.no_grad():
        alone = policy(collate([first]), None)[1]
        after = policy(collate([*others, first]), None)[1][-len(alone) :]
    torch.testing.assert_close(after, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_bit_of_the_gradients(model_folder: Path, world: World, mode: str) -> None:
    batch = collate(random_samples(400))
    gradients = []
    for checkpointing in ("none", mode):
        config = ModelConfig.model_validate({"path": str(model_folder), "checkpointing": checkpointing})
        policy = load_policy(config, world)
        policy(batch, LossConfig())[0].backward()
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)


LOSSES = {
    "grpo": LossConfig(),
    "clip-higher": LossConfig(clip_high=0.28),
    "dual clip": LossConfig(dual_clip=3.0),
    "no clip": LossConfig(clip_low=None, clip_high=None),
    "kl": LossConfig(kl_coef=0.05),
    "entropy bonus": LossConfig(entropy_coef=0.01),
    "importance weights": LossConfig(tis_cap=2.0),
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_joint_objective_equals_full_logits_in_float64(model_folder: Path, loss: LossConfig, off_policy: bool) -> None:
    """J_RLVR + R_MEL on a mixed batch: policy rows, NLL rows and context in one pack, value and every gradient."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="mel_packed")
    policy = Policy(model, "padded", ModelConfig(path=str(model_folder), kernels="torch"))
    samples = random_samples(model.config.vocab_size)
    batch = collate(samples)
    torch.manual_seed(1)
    noise = 0.3 * torch.randn(2, len(batch.rows))
    with torch.no_grad():
        logp = policy(batch, None)[1]
    if off_policy:
        batch = replace(batch, old_logp=logp + noise[0])
    batch = replace(batch, ref_logp=logp + noise[1])
    value, _, _, _ = policy(batch, loss)
    value.backward()

    oracle = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    expected = full_logits_loss(oracle, samples, batch, loss)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    for (name, ours), theirs in zip(policy.model.named_parameters(), oracle.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-5, f"{name}: relative gradient error {error:.1e}"


def full_logits_loss(
    model: torch.nn.Module, samples: list[Sample], batch: PackedBatch, config: LossConfig
) -> torch.Tensor:
    """The paper's formulas, sequence by sequence, on full logits."""
    logps, entropies = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.ids)
        log_p = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1], dim=-1)
        chosen = torch.from_numpy(sample.stream[1:] != 0)
        logps.append(log_p.gather(1, ids[1:, None]).squeeze(1)[chosen])
        entropies.append(-(log_p.exp() * log_p).sum(-1)[chosen])
    logp, entropy = torch.cat(logps), torch.cat(entropies)
    advantage, weight = batch.advantage.double(), batch.weight.double()
    old = logp.detach() if batch.old_logp is None else batch.old_logp.double()
    ratio = torch.exp(logp - old)
    low = 0.0 if config.clip_low is None else 1 - config.clip_low
    high = float("inf") if config.clip_high is None else 1 + config.clip_high
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    if config.dual_clip is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, config.dual_clip * advantage), surrogate)
    if config.tis_cap is not None:
        surrogate = surrogate * torch.exp(old - batch.rollout_logp.double()).clamp(max=config.tis_cap)
    assert batch.ref_logp is not None
    gap = batch.ref_logp.double() - logp
    policy = -surrogate + config.kl_coef * (gap.exp() - gap - 1) - config.entropy_coef * entropy
    rows = torch.where(batch.stream == Stream.POLICY, policy, -logp)
    return (weight * rows).sum()


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
def test_gspo_equals_its_formula_on_full_logits_in_float64(model_folder: Path, off_policy: bool) -> None:
    """Sequence by sequence: the geometric mean of the token ratios, clipped as a whole; beside it the NLL rows."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="mel_packed")
    policy = Policy(model, "padded", ModelConfig(path=str(model_folder), kernels="torch"))
    samples = random_samples(model.config.vocab_size)
    batch = collate(samples)
    torch.manual_seed(1)
    if off_policy:
        with torch.no_grad():
            batch = replace(batch, old_logp=policy(batch, None)[1] + 0.3 * torch.randn(len(batch.rows)))
    value, _, _, metrics = policy(batch, SequenceLoss(clip_low=0.05, clip_high=0.1, entropy_coef=0.01))
    value.backward()

    oracle = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64, attn_implementation="eager")
    expected, start, held = torch.zeros((), dtype=torch.float64), 0, 0
    for sample in samples:
        ids, chosen = torch.from_numpy(sample.ids), torch.from_numpy(sample.stream[1:] != 0)
        log_p = torch.log_softmax(oracle(input_ids=ids[None], use_cache=False).logits[0, :-1], dim=-1)[chosen]
        logp, entropy = log_p.gather(1, ids[1:][chosen][:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
        weight = torch.from_numpy(sample.weight[1:])[chosen].double()
        if sample.kind == "policy":
            old = logp.detach() if batch.old_logp is None else batch.old_logp[start : start + len(logp)].double()
            ratio, advantage = (logp - old).mean().exp(), float(sample.advantage[0])
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.1) * advantage)
            held += len(logp) * int(surrogate.item() != (ratio * advantage).item())
            expected = expected - weight.sum() * surrogate - 0.01 * (weight * entropy).sum()
        else:
            expected = expected - (weight * logp).sum()
        start += len(logp)
    expected.backward()
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)
    assert metrics["policy/clip_low"] + metrics["policy/clip_high"] == held
    assert (held > 0) == off_policy
    for ours, theirs in zip(policy.model.parameters(), oracle.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() < 2e-5 * theirs.grad.norm()


def test_bf16_compute_keeps_float32_master_weights(model_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, because sharding needs a process group."""
    script = tmp_path / "bf16.py"
    script.write_text(
        f"""
import torch
from mel_kernels import LossConfig
from mel_fast.distributed import join_world
from mel_fast.policy import ModelConfig, load_policy
from mel_fast.gspo import SequenceLoss
from mel_fast.packing import collate
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from support import random_samples
with join_world("cpu", 5) as world:
    batch = collate(random_samples(400))
    exact = load_policy(ModelConfig(path={str(model_folder)!r}), world)(batch, None)[1]
    policy = load_policy(ModelConfig(path={str(model_folder)!r}, dtype="bfloat16"), world)
    loss, logp, _, _ = policy(batch, LossConfig())
    loss.backward()
    assert all(p.dtype == torch.float32 == p.grad.dtype for p in policy.parameters())
    gap = (logp - exact).abs().max().item()
    assert 1e-6 < gap < 0.5, gap
"""
    )
    result = torchrun(1, str(script))
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_missing_model_is_one_clear_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path=.*nowhere.*no such folder"):
        load_policy(ModelConfig(path=str(tmp_path / "nowhere")), world)


def test_buffers_keep_their_precision_in_a_16_bit_model(model_folder: Path) -> None:
    """Frequencies rounded to bf16 turn position 1000 by whole radians."""
    model = load_model(ModelConfig(path=str(model_folder)), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sharded_loading_equals_plain_loading_and_only_rank_0_reads(
    world: World, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tied: bool
) -> None:
    make_model(len(tokenizer), tied=tied).save_pretrained(tmp_path / "model")
    result = torchrun(2, str(Path(__file__).parent / "ranks" / "loading.py"), str(tmp_path / "model"), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    plain = load_policy(ModelConfig(path=str(tmp_path / "model")), world)
    with torch.no_grad():
        logp = plain(collate(random_samples(400)), None)[1]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["logp"], logp, atol=0, rtol=0)
        torch.testing.assert_close(found["buffers"], dict(plain.model.named_buffers()), atol=0, rtol=0)
        assert found["tied"] is tied


def test_weights_that_only_rank_0_can_miss_are_one_error_on_every_rank(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(model_folder / "config.json", tmp_path / "model")
    result = torchrun(2, str(Path(__file__).parent / "ranks" / "loading.py"), str(tmp_path / "model"), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        assert "no checkpoint in that folder" in torch.load(tmp_path / f"{rank}.pt")["error"]


def test_a_model_with_sliding_windows_is_refused(
    world: World, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model(len(tokenizer))
    model.config.use_sliding_window, model.config.sliding_window = True, 16
    model.config.layer_types = ["full_attention", "sliding_attention"]
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="sliding-window"):
        load_policy(ModelConfig(path=str(tmp_path)), world)


def test_an_attention_that_cannot_run_here_is_refused_by_name() -> None:
    assert choose_implementation("auto", torch.device("cpu"), torch.float32) == "padded"
    with pytest.raises(InputError, match=r"model\.attention=varlen needs CUDA"):
        choose_implementation("varlen", torch.device("cpu"), torch.float32)


def test_liger_that_cannot_run_here_is_refused_by_name_and_auto_does_without(model_folder: Path, world: World) -> None:
    auto = load_policy(ModelConfig(path=str(model_folder)), world)
    assert not any("Liger" in module._get_name() for module in auto.modules())
    with pytest.raises(InputError, match=r"model\.liger=true: it needs CUDA, not cpu"):
        load_policy(ModelConfig(path=str(model_folder), liger=True), world)
    with pytest.raises(ValueError, match="fuse the same operations"):
        ModelConfig(path="x", liger=True, compile=True)


def test_liger_replaces_norms_and_mlps_but_no_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which modules change; what they compute is a matter of a GPU."""
    pytest.importorskip("liger_kernel")
    rope = modeling_qwen3.apply_rotary_pos_emb
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):  # Liger changes the module; put it back
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    model, cuda = make_model(50), World(0, 1, torch.device("cuda"))
    forward = model.forward
    assert fuse(model, ModelConfig(path="x"), cuda)
    assert model.forward == forward
    assert modeling_qwen3.apply_rotary_pos_emb is not rope
    names = {name: module.forward.__func__.__qualname__ for name, module in model.named_modules()}
    assert names["model.layers.0.self_attn.q_norm"] == names["model.norm"] == "LigerRMSNorm.forward"
    assert names["model.layers.1.mlp"] == "LigerSwiGLUMLP.forward"
    monkeypatch.setattr(model.config, "model_type", "nobodys")
    with pytest.raises(InputError, match=r"does not know the family 'nobodys'"):
        fuse(model, ModelConfig(path="x", liger=True), cuda)
    assert not fuse(model, ModelConfig(path="x"), cuda)
    assert "the model runs without Liger, because it does not know the family 'nobodys'" in caplog.text
