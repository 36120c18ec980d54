"""Attention over packed sequences, registered with transformers under one name, so that any of its models can use it.

Three implementations that agree: `flash` (flash-attn's varlen kernel), `varlen` (torch's own, CUDA and 16-bit only)
and `padded` (any device and dtype: sequences of similar length are laid side by side and run through causal SDPA;
keys behind a sequence's end are in its causal future, so no mask is needed).

T packed tokens, B sequences, L longest sequence, A query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from mel_fast.errors import InputError
from mel_fast.packing import PackedBatch

ATTENTION_NAME = "mel_packed"
Implementation = Literal["flash", "varlen", "padded"]

VARLEN_SHARES_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch's varlen takes fewer key/value heads than query heads after 2.11; before, they are repeated."""


@dataclass(frozen=True, slots=True)
class LengthClass:
    """Sequences of similar length, laid side by side on a grid of `count` rows of `length` slots."""

    tokens: Tensor  # [t] which of the T tokens they are
    slots: Tensor  # [t] where each stands in the grid, row by row
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the sequences lie; made once per micro-batch and handed through the model to every block."""

    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    implementation: Implementation
    classes: tuple[LengthClass, ...] = ()  # only `padded` needs them
    restore: Tensor | None = None  # [T] undoes the order of the classes' tokens

    @classmethod
    def of(cls, batch: PackedBatch, implementation: Implementation, *, one_class: bool = False) -> PackedLayout:
        """`one_class`: `padded` pads all sequences to the longest; more work, but always the same operations."""
        if implementation != "padded":
            return cls(batch.cu_seqlens, batch.max_seqlen, implementation)
        lengths = batch.cu_seqlens.diff().long()  # [B]
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)  # [T]
        # Padding to the longest of all would cost its square for each; within a power of two it costs 4 times at most.
        size = torch.zeros_like(lengths) if one_class else torch.log2(lengths.float()).floor().int()  # [B]
        classes: list[LengthClass] = []
        for value in size.unique().tolist():
            members = size == value  # [B]
            row = members.long().cumsum(0) - 1  # [B]
            tokens = members[sequence].nonzero().squeeze(1)  # [t]
            length = int(lengths[members].max())
            slots = row[sequence[tokens]] * length + batch.position_ids[tokens]
            classes.append(LengthClass(tokens, slots, int(members.sum()), length))
        restore = torch.cat([each.tokens for each in classes]).argsort()
        return cls(batch.cu_seqlens, batch.max_seqlen, implementation, tuple(classes), restore)


def choose_implementation(wanted: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """Resolves `auto`. A named implementation is taken at its word or refused.

    Raises:
        InputError: the named implementation cannot run on this device and dtype, or is not installed.
    """
    fits_kernels = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if wanted == "auto":
        return ("flash" if has_flash else "varlen") if fits_kernels else "padded"
    if wanted == "padded":
        return "padded"
    if not fits_kernels:
        raise InputError(f"model.attention={wanted} needs CUDA and 16-bit compute, not {device.type} {dtype}; use auto")
    if wanted == "flash":
        if not has_flash:
            raise InputError("model.attention=flash needs the package flash-attn; install it or use auto")
        return "flash"
    return "varlen"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, A, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: PackedLayout,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature. Returns ([1, T, A, D], None).

    Raises:
        ValueError: the model asks for a sliding window or a mask, which packed training does not implement.
    """
    if sliding_window is not None or attention_mask is not None:
        raise ValueError("packed attention implements full causal attention only (no sliding window, no extra mask)")
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, A | K, D]
    if layout.implementation == "padded":
        out = _padded(q, k, v, layout, scaling, dropout)
    elif layout.implementation == "flash":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]  # optional dependency

        seqlens = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
        out = flash_attn_varlen_func(q, k, v, *seqlens, dropout_p=dropout, softmax_scale=scaling, causal=True)
    else:
        options: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
        if VARLEN_SHARES_HEADS:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        seqlens = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)
        out = varlen_attn(q, k, v, *seqlens, **options)
        assert isinstance(out, Tensor)  # a tuple only with return_aux
    return out.unsqueeze(0), None


def _padded(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None, dropout: float) -> Tensor:
    assert layout.restore is not None
    outputs: list[Tensor] = []
    for each in layout.classes:

        def spread(x: Tensor, each: LengthClass = each) -> Tensor:  # [T, A, D] -> [count, A, length, D]
            grid = x.new_zeros(each.count * each.length, *x.shape[1:])
            grid = grid.index_copy(0, each.slots, x.index_select(0, each.tokens))
            return grid.view(each.count, each.length, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            spread(q), spread(k), spread(v), dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, each.slots))  # [t, A, D]
    return torch.cat(outputs).index_select(0, layout.restore)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
