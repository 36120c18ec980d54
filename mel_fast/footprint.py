"""What a model's activations weigh, counted on fake tensors: shapes and lifetimes without memory, on any machine.

Two numbers are enough for a plan, because both grow with the number of tokens alone: what a block keeps for its
backward, and what the backward needs on top while it works on one block. They are not formulas but the model's own code
at work, so they hold for each family, type and way of checkpointing. Attention is counted as one of the CUDA kernels
(`varlen`; flash-attn keeps the same); Liger and `model.compile` keep less than is counted here.

T packed tokens, L blocks.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

from mel_fast.attention import ATTENTION_NAME, PackedLayout
from mel_fast.blocks import checkpoint_blocks
from mel_fast.model import Checkpointing


class Living(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it and still alive.

    Attributes:
        now: bytes alive.
        peak: the most there have been; may be set back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> Living:
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP2 frees what it gathered in this way
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._count(storage)
            return result

        torch.UntypedStorage.resize_ = counted  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor first: what it asks of its local tensors comes back here
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    weakref.finalize(storage, self._forget, storage._cdata)
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.now += storage.nbytes() - self._sizes.get(storage._cdata, 0)
        self._sizes[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per packed token."""

    block: float  # kept by each block until its backward
    ends: float  # kept by embedding and final norm
    work: float  # on top, at the worst moment of the blocks' backward

    def kept(self, layers: int, tokens: int) -> float:
        return tokens * (self.ends + layers * self.block)


def measure(shape: Any, dtype: torch.dtype, checkpointing: Checkpointing) -> Footprint:
    """Runs forward and backward of two and of three blocks.

    Args:
        shape: transformers configuration of the model.
        dtype: of the computation.
    """
    few, many = 8192, 16384  # far above where a kernel's or a weight's own memory matters
    kept: dict[tuple[int, int], int] = {}
    peak: dict[tuple[int, int], int] = {}
    for layers in (2, 3):
        for tokens in (few, many):
            kept[layers, tokens], peak[layers, tokens] = _run(shape, dtype, checkpointing, layers, tokens)
    tokens = many - few
    two, three = ((kept[n, many] - kept[n, few]) / tokens for n in (2, 3))
    work = (peak[3, many] - peak[3, few]) / tokens - three
    return Footprint(block=three - two, ends=two - 2 * (three - two), work=work)


def _run(shape: Any, dtype: torch.dtype, checkpointing: Checkpointing, layers: int, tokens: int) -> tuple[int, int]:
    """Bytes kept after the forward, and the peak of the backward."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = (shape.layer_types * layers)[:layers]
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=ATTENTION_NAME).train()
        checkpoint_blocks(model, checkpointing)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        layout = PackedLayout(torch.zeros(2, dtype=torch.int32), tokens, "varlen")
        with Living() as living:
            hidden = model.base_model(
                input_ids=ids, position_ids=ids, use_cache=False, layout=layout
            ).last_hidden_state  # [1, T, H]
            kept = living.peak = living.now
            hidden.backward(torch.zeros_like(hidden))
            return kept, living.peak
