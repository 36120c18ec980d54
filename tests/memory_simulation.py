"""Peak memory of an update without its memory: the real policy, FSDP2 and AdamW on fake tensors, every storage counted.

Fake tensors have shapes and lifetimes but no contents, so models of any size run on any machine. Ranks other than this
one are played by torch's fake process group. The head alone is played by a stand-in that allocates what the Triton head
does: its kernels take no fake tensors.

    PYTHONPATH=.:kernels:tests python tests/memory_simulation.py     # the planner's error for the models of the paper
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from mel_kernels import LossConfig, LossOutput
from mel_kernels.attach import attach_gradients
from mel_kernels.gradients import Gradients
from mel_kernels.triton_head import BUFFER_BYTES, MAX_CHUNK_ROWS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from mel_fast import policy as policy_module
from mel_fast.attention import ATTENTION_NAME
from mel_fast.distributed import World
from mel_fast.footprint import Living
from mel_fast.memory import GIB, Planner
from mel_fast.model import ModelConfig
from mel_fast.packing import PackedBatch
from mel_fast.plan import named_shape
from mel_fast.policy import assemble

# Model, tokens of the micro-batch, ranks, settings.
CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("Qwen/Qwen3-0.6B-Base", 8192, 1, {}),
    ("Qwen/Qwen3-0.6B-Base", 32768, 8, {"checkpointing": "full"}),
    ("Qwen/Qwen3-1.7B-Base", 16384, 1, {"checkpointing": "selective"}),
    ("Qwen/Qwen3-4B-Base", 16384, 1, {"checkpointing": "full"}),
    ("Qwen/Qwen3-4B-Base", 16384, 8, {"checkpointing": "selective"}),
    ("Qwen/Qwen3-4B-Base", 2048, 1, {"checkpointing": "full"}),
    ("Qwen/Qwen3-8B-Base", 32768, 8, {"checkpointing": "full"}),
    ("Qwen/Qwen3-8B-Base", 16384, 4, {"checkpointing": "full", "reshard_after_forward": False}),
    ("Qwen/Qwen3-8B-Base", 4096, 64, {}),
    ("Qwen/Qwen3-14B-Base", 2048, 8, {"checkpointing": "full"}),
    ("Qwen/Qwen3-14B-Base", 65536, 64, {"checkpointing": "full"}),
]


def head_stand_in(hidden: Tensor, weight: Tensor, target: Tensor, *_: Any, **__: Any) -> LossOutput:
    """Allocates as `chunked.fused_loss` does with `TritonHead`."""
    with torch.no_grad():
        rows, vocab = len(hidden), len(weight)
        chunk = min(BUFFER_BYTES // (vocab * weight.itemsize), MAX_CHUNK_ROWS, rows)
        buffer = weight.new_empty(chunk, vocab)  # E
        sums = Gradients(hidden, weight, None, torch.float32, (True, True, False))
        assert sums.hidden is not None
        for start in range(0, rows, chunk):
            x = hidden[start : start + chunk].clone()  # [C, H]
            scaled = (x * 2.0).to(x.dtype)
            product = x.new_empty(x.shape, dtype=torch.float32)  # [C, H]
            sums.hidden[start : start + chunk] = product.to(x.dtype)
            product.square_().sum(1)
            del x, scaled, product
        gradients = sums.rounded()
        del sums, buffer
    logp = target.new_zeros(rows, dtype=torch.float32)
    loss = attach_gradients(
        logp.sum(), hidden=(hidden, gradients[0]), lm_head=(weight, gradients[1]), bias=(None, None)
    )
    return LossOutput(loss, logp, logp, {})


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def peak_of_an_update(config: ModelConfig, shape: Any, tokens: int, rows: int, ranks: int) -> dict[str, float]:
    """Bytes of a rank between updates and at the peak of one, with AdamW's moments in place."""
    world = World(0, ranks, torch.device("cpu"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    original = policy_module.fused_loss
    policy_module.fused_loss = head_stand_in
    try:
        with fake_group(ranks):
            policy = assemble(model, "varlen", config, world, sharded=True)
            with FakeTensorMode(allow_non_fake_inputs=True), Living() as living:
                policy.to_empty(device="cpu")
                model.tie_weights()
                optimizer = torch.optim.AdamW(policy.parameters(), foreach=True)
                batch = fake_batch(tokens, rows)
                result: dict[str, float] = {}
                for name in ("first", "second"):
                    if name == "first":
                        policy(batch, LossConfig())[0].backward()
                    else:
                        result["resident"] = float(living.now)
                        living.peak = living.now
                        loss = policy(batch, LossConfig())[0]
                        result["saved"] = float(living.now) - result["resident"]
                        result["forward"] = float(living.peak)
                        living.peak = living.now
                        loss.backward()
                        result["backward"] = float(living.peak)
                    optimizer.step()
                return result
    finally:
        policy_module.fused_loss = original


def fake_batch(tokens: int, rows: int) -> PackedBatch:
    whole, row = torch.zeros(tokens, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    number = torch.zeros(rows)
    return PackedBatch(
        input_ids=whole,
        position_ids=whole,
        cu_seqlens=torch.zeros(9, dtype=torch.int32),
        max_seqlen=tokens // 8,
        rows=row,
        target=row,
        stream=row.to(torch.int8),
        advantage=number,
        weight=number,
        temperature=number,
        kind=row,
        rollout_logp=number,
        members=torch.arange(8),
    )


def predicted_and_counted(name: str, tokens: int, ranks: int, changes: dict[str, Any]) -> tuple[float, float]:
    """Bytes at the peak of an update in bfloat16, all tokens with loss."""
    config = ModelConfig.model_validate({"path": name, "dtype": "bfloat16"} | changes)
    shape, _ = named_shape(config)
    counted = peak_of_an_update(config, shape, tokens, tokens, ranks)
    planner = Planner.of(config, shape, ranks)
    assert abs(sum(planner.resident().values()) / counted["resident"] - 1) < 0.01, "between updates"
    return planner.peak(tokens), max(counted["forward"], counted["backward"])


def main() -> None:
    heading = ("model", "ranks", "tokens", "settings", "planned, GiB", "counted, GiB", "error")
    print(f"| {' | '.join(heading)} |\n|---|---:|---:|---|---:|---:|---:|")
    for name, tokens, ranks, changes in CASES:
        planned, counted = predicted_and_counted(name, tokens, ranks, changes)
        cells = (name[5:-5], ranks, tokens, ", ".join(f"{key}={value}" for key, value in changes.items()))
        sizes = f"{planned / GIB:.2f} | {counted / GIB:.2f} | {planned / counted - 1:+.1%}"
        print(f"| {' | '.join(map(str, cells))} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
