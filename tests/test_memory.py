"""The planner against the thing itself: the real policy, FSDP2 and AdamW on fake tensors, or on real ones in small."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from mel_kernels import LossConfig
from memory_simulation import CASES, peak_of_an_update, predicted_and_counted
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from mel_fast.attention import ATTENTION_NAME
from mel_fast.distributed import World
from mel_fast.footprint import Living, measure
from mel_fast.memory import GIB, TRITON_BUFFER, TRITON_ROWS, Planner
from mel_fast.model import ModelConfig
from mel_fast.packing import PackedBatch, collate
from mel_fast.plan import SHAPES, named_shape
from mel_fast.policy import assemble
from mel_fast.types import Sample

FAMILIES: dict[str, type] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def small(family: str = "qwen3", vocabulary: int = 500, layers: int = 3, **changes: Any) -> Any:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 320}
    shape = FAMILIES[family](vocab_size=vocabulary, num_hidden_layers=layers, **sizes | changes)
    if family != "qwen2":
        shape.head_dim = 32
    return shape


def settings(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": "a model", "dtype": "bfloat16"} | changes)


def test_what_a_qwen3_block_keeps_is_what_its_formulas_say() -> None:
    """Bytes per token in bf16. A norm keeps its input in fp32, what it normalised and its output; attention q, k, v and
    its output; the MLP gate, silu(gate), up and their product; and a float32 per norm and per head's logsumexp."""
    h, q, k, i, heads = 128, 4 * 32, 2 * 32, 320, 6
    block = measure(small(), torch.bfloat16, "none").block
    norms, attention, mlp = 8 * (2 * h) + 6 * (q + k), 2 * (2 * q + 2 * k), 8 * i
    assert block == norms + attention + mlp + 4 * (2 + heads) + 4 * 4
    assert measure(small(), torch.bfloat16, "full").block == 2 * h


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_keeps_less_the_more_it_recomputes(family: str) -> None:
    full, selective, none = (measure(small(family), torch.bfloat16, mode) for mode in ("full", "selective", "none"))
    assert full.block < selective.block < none.block / 2
    assert full.work >= selective.work > none.work


def equal_samples(count: int, length: int = 128) -> PackedBatch:
    one, stream = np.ones(length, dtype=np.float32), np.ones(length, dtype=np.int8)
    stream[0] = 0
    return collate([Sample(np.arange(length), stream, one, 0.01 * one, one, kind="policy")] * count)


SDPA = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class Calls(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "attentions", "recomputed"), [("none", 1, 0), ("selective", 1, 3), ("full", 2, 6)])
def test_what_is_recomputed(mode: str, attentions: int, recomputed: int) -> None:
    """Per block: selective repeats three of seven products and no attention; full all but the last product."""
    layers, config = 3, settings(dtype="float32", checkpointing=mode)
    model = AutoModelForCausalLM.from_config(small(layers=layers), attn_implementation=ATTENTION_NAME)
    policy = assemble(model, "padded", config, World(0, 1, torch.device("cpu")), sharded=False)
    with Calls() as calls:
        policy(equal_samples(2), LossConfig())[0].backward()
    products = calls.count["aten.mm.default"] - 1  # the head's, in one chunk; its others have an `out`
    assert calls.count[SDPA] == attentions * layers
    assert products == (7 + 14 + recomputed) * layers, "each product has two in its backward"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens", "ranks", "changes"), [CASES[i] for i in (0, 4, 7, 8, 10)])
def test_the_predicted_peak_is_within_a_tenth(name: str, tokens: int, ranks: int, changes: dict[str, Any]) -> None:
    predicted, counted = predicted_and_counted(name, tokens, ranks, changes)
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_predicted_peak_is_within_a_tenth_for_other_families(family: str) -> None:
    shape = small(family, vocabulary=32000, layers=4, hidden_size=2048, intermediate_size=8192)
    measured = peak_of_an_update(settings(), shape, 8192, 8192, 2)
    assert Planner.of(settings(), shape, 2).peak(8192) == pytest.approx(
        max(measured["forward"], measured["backward"]), rel=0.1
    )


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("vocabulary", [500, 8000])
def test_the_predicted_peak_of_a_small_model_on_the_cpu_is_within_a_tenth(vocabulary: int, mode: str) -> None:
    """No stand-in and nothing fake: all storages of a real update in float32, with the head in PyTorch."""
    config, shape, batch = settings(dtype="float32", checkpointing=mode), small(vocabulary=vocabulary), equal_samples(8)
    with Living() as living:
        model = AutoModelForCausalLM.from_config(shape, attn_implementation=ATTENTION_NAME)
        policy = assemble(model, "padded", config, World(0, 1, torch.device("cpu")), sharded=False)
        optimizer = torch.optim.AdamW(policy.parameters())
        policy(batch, LossConfig())[0].backward()
        optimizer.step()
        living.peak = living.now
        policy(batch, LossConfig())[0].backward()
    planner = Planner.of(config, shape, 1)
    predicted = sum(planner.resident().values()) + max(planner.moments(batch.tokens, len(batch.rows)).values())
    assert predicted == pytest.approx(living.peak, rel=0.1)


def test_the_planner_knows_the_buffers_of_the_triton_head() -> None:
    triton_head = pytest.importorskip("mel_kernels.triton_head")
    assert (TRITON_BUFFER, TRITON_ROWS) == (triton_head.BUFFER_BYTES, triton_head.MAX_CHUNK_ROWS)


def test_the_largest_budget_is_the_last_that_fits() -> None:
    shape, _ = named_shape(settings(path="Qwen/Qwen3-8B-Base"))
    planner, device = Planner.of(settings(checkpointing="full"), shape, 8), 80.0 * GIB
    budget = planner.largest_budget(device)
    assert planner.peak(budget) <= 0.9 * device < planner.peak(budget + 1)
    assert Planner.of(settings(checkpointing="full"), shape, 1).largest_budget(device) == 0  # AdamW alone is 122 GiB
    alone = Planner.of(settings(checkpointing="full", offload=True), shape, 1)
    assert alone.largest_budget(device) > budget  # nothing rests on the device
    assert "Qwen/Qwen3-8B-Base" in SHAPES
