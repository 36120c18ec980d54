"""The packed forward is the plain forward, sequence by sequence; the joint loss is the textbook one in float64."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mel_kernels import LossConfig, Stream
from support import FAMILIES, make_model, random_samples, torchrun
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mel_fast import attention
from mel_fast.attention import choose_implementation
from mel_fast.blocks import fuse
from mel_fast.distributed import World, join_world, leave
from mel_fast.errors import InputError
from mel_fast.gspo import SequenceLoss
from mel_fast.model import ModelConfig, load_model
from mel_fast.packing import PackedBatch, collate
from mel_fast.policy import Policy, load_policy
from mel_fast.types import Sample


@pytest.fixture
def policy(model_folder: Path, world: World) -> Policy:
    return load_policy(ModelConfig(path=str(model_folder)), world)


def separate_logps(model: torch.nn.Module, samples: list[Sample]) -> list[torch.Tensor]:
    """Log-probs [L - 1] of each sample's tokens, one plain forward per sequence."""
    logps = []
    for sample in samples:
        ids = torch.from_numpy(sample.ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [L - 1, V]
        logps.append(torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None]).squeeze(1))
    return logps


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_model(len(tokenizer), family=family, tied=family != "llama").save_pretrained(folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probs_and_gradients_equal_those_of_separate_forwards(
    families: dict[str, Path], world: World, family: str
) -> None:
    policy = load_policy(ModelConfig(path=str(families[family])), world)
    samples = random_samples(policy.config.vocab_size)
    batch = replace(collate(samples), stream=torch.full_like(collate(samples).stream, Stream.NLL))
    value, packed, _, _ = policy(batch, LossConfig())
    value.backward()
    model: Any = AutoModelForCausalLM.from_pretrained(
        families[family], dtype=torch.float64, attn_implementation="eager"
    )
    expected = torch.cat(
        [
            logps[torch.from_numpy(sample.stream[1:] != 0)]
            for sample, logps in zip(samples, separate_logps(model, samples), strict=True)
        ]
    )
    assert expected.std() > 1, "weights too small to tell a wrong mask"
    torch.testing.assert_close(packed.double(), expected, atol=3e-5, rtol=0)
    (-(batch.weight.double() * expected).sum()).backward()
    for (name, ours), theirs in zip(policy.model.named_parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-5, f"{name}: relative gradient error {error:.1e}"


def kernel(
    scale: float | None,
    q: torch.Tensor,  # [T, A, D]
    k: torch.Tensor,  # [T, K, D]
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> torch.Tensor:
    """What the varlen kernels of torch and flash-attn compute when they are causal, one sequence after the other; they
    take query heads that share key/value heads in order."""
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    assert cu_seqlens_q[-1] == len(q) == len(k) == len(v)
    out = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        one, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))  # [A | K, L, D]
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scores = one @ keys.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)  # [A, L, L]
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        out.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(out)


def torch_varlen(*tensors: Any, window_size: tuple[int, int], scale: float, enable_gqa: bool) -> torch.Tensor:
    """torch 2.13's signature."""
    assert window_size == (-1, 0)  # causal
    assert enable_gqa
    return kernel(scale, *tensors)


def torch_varlen_2_11(*tensors: Any, window_size: tuple[int, int], scale: float) -> torch.Tensor:
    """It takes no shared heads."""
    assert window_size == (-1, 0)
    assert tensors[0].shape == tensors[1].shape == tensors[2].shape
    return kernel(scale, *tensors)


def flash_varlen(*tensors: Any, dropout_p: float, softmax_scale: float, causal: bool) -> torch.Tensor:
    assert causal
    assert dropout_p == 0
    return kernel(softmax_scale, *tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("installed", ["flash-attn", "torch 2.13", "torch 2.11"])
def test_the_kernels_of_a_gpu_are_asked_for_the_same_attention(
    families: dict[str, Path], world: World, monkeypatch: pytest.MonkeyPatch, family: str, installed: str
) -> None:
    """With stand-ins on the CPU for kernels that need CUDA: heads, scale, lengths and causality reach them right."""
    policy = load_policy(ModelConfig(path=str(families[family])), world)
    if installed == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_varlen))
    else:
        monkeypatch.setattr(attention, "varlen_attn", torch_varlen if "13" in installed else torch_varlen_2_11)
        monkeypatch.setattr(attention, "VARLEN_SHARES_HEADS", "13" in installed)
    batch, gradients, logps = collate(random_samples(policy.config.vocab_size)), [], []
    for implementation in ("padded", "flash" if installed == "flash-attn" else "varlen"):
        policy.implementation = implementation
        policy.zero_grad()
        value, logp, _, _ = policy(batch, LossConfig())
        value.backward()
        logps.append(logp)
        gradients.append([p.grad for p in policy.parameters()])
    torch.testing.assert_close(logps[1], logps[0], atol=3e-5, rtol=0)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours - theirs).norm() < 2e-5 * theirs.norm()


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


def test_bf16_compute_keeps_float32_master_weights(model_folder: Path) -> None:
    batch = collate(random_samples(400))
    with join_world("cpu", 5) as world:  # sharding needs a process group
        exact = load_policy(ModelConfig(path=str(model_folder)), world)(batch, None)[1]
        policy = load_policy(ModelConfig(path=str(model_folder), dtype="bfloat16"), world)
        loss, logp, _, _ = policy(batch, LossConfig())
        loss.backward()
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}
        assert all(p.grad is not None for p in policy.parameters())
        assert 1e-6 < (logp - exact).abs().max() < 0.5
        del policy, loss
    leave()


def test_a_missing_model_is_one_clear_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.path=.*nowhere.*no such folder"):
        load_policy(ModelConfig(path=str(tmp_path / "nowhere")), world)
    (tmp_path / "config.json").write_text('{"model_type": "nobodys"}')
    with pytest.raises(InputError, match=r"model\.path=.*no checkpoint in that folder that transformers knows"):
        load_policy(ModelConfig(path=str(tmp_path)), world)


def test_buffers_keep_their_precision_in_a_16_bit_model(model_folder: Path) -> None:
    """Frequencies rounded to bf16 turn position 1000 by whole radians."""
    model = load_model(ModelConfig(path=str(model_folder)), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What each of two ranks found, by name of the model: one with, one without a tied head, one without weights."""
    folder = tmp_path_factory.mktemp("loading")
    names = ("tied", "untied", "empty")
    for name in names:
        make_model(len(tokenizer), tied=name == "tied").save_pretrained(folder / name)
    (folder / "empty" / "model.safetensors").unlink()
    script, models = str(Path(__file__).parent / "ranks" / "loading.py"), [str(folder / name) for name in names]
    result = torchrun(2, script, str(folder), *models)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    return {"folder": folder} | {name: [rank[str(folder / name)] for rank in ranks] for name in names}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_sharded_loading_equals_plain_loading_and_only_rank_0_reads(
    world: World, loaded: dict[str, Any], name: str
) -> None:
    plain = load_policy(ModelConfig(path=str(loaded["folder"] / name)), world)
    with torch.no_grad():
        logp = plain(collate(random_samples(400)), None)[1]
    for found in loaded[name]:
        torch.testing.assert_close(found["logp"], logp, atol=0, rtol=0)
        torch.testing.assert_close(found["buffers"], dict(plain.model.named_buffers()), atol=0, rtol=0)
        assert found["tied"] is (name == "tied")


def test_weights_that_only_rank_0_can_miss_are_one_error_on_every_rank(loaded: dict[str, Any]) -> None:
    assert all("no checkpoint in that folder" in found["error"] for found in loaded["empty"])


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


@pytest.mark.parametrize("family", FAMILIES)
def test_liger_replaces_norms_and_mlps_but_no_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    """Which modules change; what they compute is a matter of a GPU."""
    pytest.importorskip("liger_kernel")
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = family.capitalize()
    rope = module.apply_rotary_pos_emb
    for changed in ("apply_rotary_pos_emb", f"{name}RMSNorm", f"{name}MLP"):  # Liger changes the module; put it back
        monkeypatch.setattr(module, changed, getattr(module, changed))
    model, cuda = make_model(50, family=family), World(0, 1, torch.device("cuda"))
    forward = model.forward
    assert fuse(model, ModelConfig(path="x"), cuda)
    assert model.forward == forward
    assert module.apply_rotary_pos_emb is not rope
    norms = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    assert len(norms) == {"qwen3": 9}.get(family, 5)  # of two blocks; Qwen3's normalise queries and keys, too
    assert {qualified(each) for each in norms} == {"LigerRMSNorm.forward"}
    assert qualified(model.get_submodule("model.layers.1.mlp")) == "LigerSwiGLUMLP.forward"
    monkeypatch.setattr(model.config, "model_type", "nobodys")
    with pytest.raises(InputError, match=r"does not know the family 'nobodys'"):
        fuse(model, ModelConfig(path="x", liger=True), cuda)
    assert not fuse(model, ModelConfig(path="x"), cuda)
    assert "the model runs without Liger, because it does not know the family 'nobodys'" in caplog.text


def qualified(module: Any) -> str:
    """The name of its forward, which is a method of the instance."""
    return module.forward.__func__.__qualname__
