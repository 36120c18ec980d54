"""How much memory a rank needs for an update, the largest token budget that fits, and what to do when it did not.

The peak is in one of three moments, of which the largest counts:

- the head: every block has run and keeps its activations; the head sums its weight's gradient in float32;
- a block's backward: what all blocks keep, the work of one, and weights and gradients on their way to and from it;
- the end: embedding and head, the largest parameters, send their gradients round in float32.

Counted is what is allocated, not what the allocator holds. P parameters, T tokens, N loss rows (at most T), H hidden,
V vocabulary, C rows of a chunk of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mel_kernels.torch_head import BUFFER_BYTES as TORCH_BUFFER
from mel_kernels.torch_head import MAX_CHUNK_ROWS as TORCH_ROWS
from transformers import AutoModelForCausalLM

from mel_fast.errors import InputError
from mel_fast.footprint import Footprint, measure
from mel_fast.model import ModelConfig

GIB = 2**30
SPARE = 0.1
"""Share of a device that a token budget leaves free: CUDA's context, NCCL's buffers, gaps between allocations."""

TRITON_BUFFER, TRITON_ROWS = 1280 * 2**20, 4096  # of mel_kernels.triton_head, whose import needs triton


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters."""

    block: int  # of one block
    blocks: int  # of all
    root: int  # embedding, head and final norm, a tied weight once
    head: int  # V x H

    @property
    def all(self) -> int:
        return self.blocks + self.root

    @classmethod
    def of(cls, shape: Any) -> Sizes:
        """Args:
        shape: transformers configuration of the model.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
        parts = [sum(p.numel() for p in block.parameters()) for block in model.base_model.layers]
        whole = sum(p.numel() for p in model.parameters())
        return cls(max(parts), sum(parts), whole - sum(parts), shape.vocab_size * shape.hidden_size)


@dataclass(frozen=True, slots=True)
class Planner:
    """Predicts, for one model and one way of computing, what each rank allocates."""

    config: ModelConfig
    shape: Any
    sizes: Sizes
    activations: Footprint
    ranks: int
    reference: bool = False  # a frozen copy for the KL term
    engine: float = 0.0  # bytes of an engine on the same device
    optimizers: int = 1  # 2: R_MEL has moments of its own (`optim.nll_lr`)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        shape: Any,
        ranks: int,
        *,
        reference: bool = False,
        engine: float = 0.0,
        optimizers: int = 1,
    ) -> Planner:
        """Measures the model's activations, on fake tensors; takes about a second."""
        footprint = measure(shape, config.compute_dtype, config.checkpointing)
        return cls(config, shape, Sizes.of(shape), footprint, ranks, reference, engine, optimizers)

    @property
    def sharded(self) -> bool:
        return self.ranks > 1 or self.config.dtype != "float32" or self.config.offload

    def resident(self) -> dict[str, float]:
        """What is there between updates, in bytes, by name."""
        share = 0.0 if self.config.offload else 4 * self.sizes.all / self.ranks
        frozen = 0.0
        if self.reference:  # what its root gathered stays: no backward follows that would free it
            frozen = share + (self._width * self.sizes.root if self.sharded else 0)
        return {
            "weights": share,
            "gradients": share,
            "optimizer": 2 * share * self.optimizers,
            "reference": frozen,
            "engine": self.engine,
        }

    def moments(self, tokens: int, rows: int | None = None) -> dict[str, float]:
        """What an update allocates on top, in bytes, at each of the three moments.

        Args:
            tokens: T of the largest micro-batch.
            rows: N of them with loss; all, if not given.
        """
        sizes, width, sharded = self.sizes, self._width, self.sharded
        kept = self.activations.kept(self.shape.num_hidden_layers, tokens)
        gathered_root = width * sizes.root if sharded else 0
        rest = 0 if self.config.reshard_after_forward or not sharded else width * sizes.blocks
        # A block and the one after it, gathered; its gradients; those of the block before, being summed over ranks.
        # Offloaded shards pass through the device in float32, in either direction.
        shards = 12 if self.config.offload else 4
        passing = (3 * width + 4 + shards / self.ranks) * sizes.block if sharded else 0
        return {
            "head": gathered_root + rest + kept + self._head(tokens if rows is None else rows),
            "blocks": gathered_root + rest + width * sizes.head + kept + tokens * self.activations.work + passing,
            "end": (4 + max(width, 4 / self.ranks)) * sizes.root if sharded else 8 * sizes.head,
        }

    def peak(self, tokens: int) -> float:
        """Bytes at the worst moment of an update whose largest micro-batch has T tokens."""
        return sum(self.resident().values()) + max(self.moments(tokens).values())

    def largest_budget(self, device_memory: float) -> int:
        """The largest token budget whose peak leaves `SPARE` of a device's bytes free; 0 if none does."""
        limit = (1 - SPARE) * device_memory
        low, high = 0, 1 << 24
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= limit else (low, middle)
        return low

    @property
    def _width(self) -> int:
        return self.config.compute_dtype.itemsize

    def _head(self, rows: int) -> float:
        """Bytes that the fused loss allocates at its worst: at the end, when the sum of dW is rounded."""
        sizes, width, hidden = self.sizes, self._width, self.shape.hidden_size
        # With `auto`, float32 is taken to mean a CPU.
        on_triton = self.config.kernels == "triton" or (self.config.kernels == "auto" and width == 2)
        buffer, longest = (TRITON_BUFFER, TRITON_ROWS) if on_triton else (TORCH_BUFFER, TORCH_ROWS)
        chunk = min(rows, longest, buffer // ((width if on_triton else 8) * self.shape.vocab_size))
        logits = chunk * self.shape.vocab_size * (width if on_triton else 8)
        upcast = 4 * sizes.head if width == 2 and not on_triton else 0
        rounded = width * sizes.head if width == 2 else 0
        return 4 * sizes.head + rounded + upcast + logits + 2 * width * rows * hidden + (2 * width + 4) * chunk * hidden


class OutOfMemory(InputError):
    """The device's memory did not suffice; says what to change."""


@contextmanager
def explained(phase: str, rank: int, tokens: int, budget: int, config: ModelConfig) -> Iterator[None]:
    """Turns torch's out-of-memory error into one that says which setting to change, best first.

    Args:
        phase: what is done inside.
        tokens: of the micro-batch; 0 outside of one.
        budget: `optim.token_budget`.

    Raises:
        OutOfMemory: in place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways: list[str] = []
        if tokens > budget:
            ways.append(f"one sample alone has {tokens} tokens: lower rollout.max_new_tokens or max_prompt_tokens")
        elif tokens:
            ways.append(f"lower optim.token_budget to {max(2, tokens // 2)}, which changes no result")
        if tokens and config.checkpointing != "full":
            ways.append("set model.checkpointing=full")
        if not config.offload:
            ways.append("set model.offload=true")
        ways.append("train on more ranks, or give an engine on this device less memory")
        where = f" with a micro-batch of {tokens} tokens" if tokens else ""
        reason = (str(error).splitlines() or ["no details"])[0]
        raise OutOfMemory(
            f"rank {rank} ran out of device memory in {phase}{where} (optim.token_budget={budget}, "
            f"model.checkpointing={config.checkpointing}, model.offload={str(config.offload).lower()}). In this order: "
            + "; ".join(f"{number}. {way}" for number, way in enumerate(ways, 1))
            + f". --dry-run predicts what fits. [{reason}]"
        ) from error
