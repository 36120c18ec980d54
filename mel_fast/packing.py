"""Samples -> packed micro-batches under a token budget, balanced over ranks by cost.

A packed micro-batch is one row of T tokens: B sequences laid end to end, told apart by `cu_seqlens` (no padding). Of
its T positions only N carry loss; those are listed in `rows`, so the head never sees the others.

T packed tokens, B sequences, N loss rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mel_fast.types import Sample

J_RLVR = ("policy", "rft", "demonstration")
KINDS = (*J_RLVR, "retrospective", "heuristic", "replay", "conclusion", "right", "opening")
"""What a sample can be. Those that are not of J_RLVR are the forms of R_MEL."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch. Row r says: hidden state `rows[r]` predicts token `target[r]`, with this stream, advantage and
    weight."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B + 1] int32
    max_seqlen: int
    rows: Tensor  # [N] int64, index into T
    target: Tensor  # [N] int64
    stream: Tensor  # [N] int8
    advantage: Tensor  # [N] float32
    weight: Tensor  # [N] float32
    temperature: Tensor  # [N] float32
    kind: Tensor  # [N] int64, index into KINDS
    rollout_logp: Tensor  # [N] float32
    members: Tensor  # [B] int64, which of the packed samples each sequence is
    old_logp: Tensor | None = None  # [N] float32; None: strictly on-policy
    ref_logp: Tensor | None = None  # [N] float32; None: no KL

    def to(self, device: torch.device) -> PackedBatch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


def collate(samples: Sequence[Sample], members: Sequence[int] | None = None) -> PackedBatch:
    """Lays samples end to end, in the order given.

    Args:
        members: what each is called by `PackedBatch.members`; by default its place among these.

    Raises:
        ValueError: a sample's first token carries loss (nothing precedes it that could predict it).
    """
    lengths = [len(sample.ids) for sample in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    stream = np.concatenate([sample.stream for sample in samples])  # [T]
    weight = np.concatenate([sample.weight for sample in samples])
    targets = np.flatnonzero((stream != 0) & (weight != 0))  # positions of the tokens to be predicted
    if np.isin(targets, starts[:-1]).any():
        raise ValueError("the first token of a sample carries loss, but nothing precedes it: give it stream 0")
    owner = np.searchsorted(starts, targets, side="right") - 1  # which sample each row belongs to
    ids = np.concatenate([sample.ids for sample in samples])
    advantage = np.concatenate([sample.advantage for sample in samples])
    rollout_logp = np.concatenate([sample.rollout_logp for sample in samples])
    kinds = np.array([KINDS.index(sample.kind) for sample in samples])
    temperatures = np.array([sample.temperature for sample in samples], dtype=np.float32)
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=max(lengths),
        rows=torch.from_numpy(targets - 1),
        target=torch.from_numpy(ids[targets]),
        stream=torch.from_numpy(stream[targets]),
        advantage=torch.from_numpy(advantage[targets]),
        weight=torch.from_numpy(weight[targets]),
        temperature=torch.from_numpy(temperatures[owner]),
        kind=torch.from_numpy(kinds[owner]),
        rollout_logp=torch.from_numpy(rollout_logp[targets]),
        members=torch.tensor(range(len(samples)) if members is None else members),
    )


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of a forward pass; a backward costs twice as much, term by term.

    A sequence of L tokens, N of them with loss, costs `token` L + `square` L^2 + `row` N.
    """

    token: float
    square: float = 0.0
    row: float = 0.0

    @classmethod
    def of(cls, config: Any) -> Cost:
        """Of a dense decoder (a transformers configuration): A query and K key/value heads of dimension D.

        Per block, two FLOPs per multiply and add: projections 2 H D (A + 2 K) into and 2 A D H out of attention, the
        gated MLP 6 H I; scores and values 2 A D L^2, of which causality leaves out the other half. The head is 2 H V
        for each row with loss.
        """
        hidden, heads = config.hidden_size, config.num_attention_heads
        dimension = getattr(config, "head_dim", None) or hidden // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        block = 2 * hidden * dimension * (2 * heads + 2 * keys) + 6 * hidden * config.intermediate_size
        layers = config.num_hidden_layers
        return cls(layers * block, layers * 2 * heads * dimension, 2 * hidden * config.vocab_size)

    def of_sequence(self, length: int, rows: int) -> float:
        return self.token * length + self.square * length * length + self.row * rows

    def of_batch(self, batch: PackedBatch) -> float:
        lengths = batch.cu_seqlens.diff().double()
        return self.token * batch.tokens + self.square * lengths.square().sum().item() + self.row * len(batch.rows)


def pack(samples: Sequence[Sample], token_budget: int, world_size: int, cost: Cost) -> list[list[PackedBatch]]:
    """Splits samples into micro-batches, equally many on each rank, such that ranks wait little for each other.

    Most expensive first into the cheapest micro-batch that has room; when none has room, start again with one more
    micro-batch per rank. FSDP keeps the ranks in step, micro-batch by micro-batch, so a step takes the sum of the
    slowest ones: those of similar cost run side by side, the most expensive first (its memory is then known first).
    A sample longer than the budget gets a micro-batch of its own: it is trained on, never dropped.

    Args:
        samples: at least one.
        token_budget: tokens per micro-batch.
        world_size: number of ranks.
        cost: of the model.

    Returns:
        [rank][micro-batch]; every rank has the same number, padded with lossless ones where samples are too few.
    """
    costs = [cost.of_sequence(len(sample.ids), loss_rows(sample)) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: (-costs[index], -len(samples[index].ids), index))
    lengths = [len(samples[index].ids) for index in order]
    costs = [costs[index] for index in order]
    alone = sum(length > token_budget for length in lengths)
    shared = sum(length for length in lengths if length <= token_budget)
    rounds = math.ceil((alone + math.ceil(shared / token_budget)) / world_size)
    while (bins := _fill(lengths, costs, token_budget, rounds * world_size)) is None:
        rounds += 1
    bins.sort(key=lambda chosen: -sum(costs[i] for i in chosen))
    members = [[order[i] for i in chosen] for chosen in bins]
    # What keeps an idle rank in step is cut from the first sample, and counts as a part of it.
    batches = [collate([samples[i] for i in m], m) if m else collate([_lossless(samples[0])]) for m in members]
    return [batches[rank::world_size] for rank in range(world_size)]


def balance_metrics(plan: Sequence[Sequence[PackedBatch]], token_budget: int, cost: Cost) -> dict[str, float]:
    """How well `pack` did, for a plan of [rank][micro-batch] (those of several updates laid end to end).

    `flops_max_over_mean` is the time of the step over that of a perfect balance, 1 at best: the sum over micro-batches
    of the slowest rank's FLOPs over the sum of the ranks' mean. `padding_share` is the share of tokens that only keep
    a rank without samples in step, `budget_fill` that of the token budget in use.
    """
    if not plan or not plan[0]:
        return {}
    flops = np.array([[cost.of_batch(batch) for batch in share] for share in plan])  # [ranks, micro-batches]
    tokens = np.array([[batch.tokens for batch in share] for share in plan])
    idle = np.array([[len(batch.rows) == 0 for batch in share] for share in plan])
    return {
        "balance/flops_max_over_mean": float(flops.max(0).sum() / flops.mean(0).sum()),
        "balance/padding_share": float(tokens[idle].sum() / tokens.sum()),
        "balance/budget_fill": float(tokens[~idle].sum() / (token_budget * tokens.size)),
        "balance/micro_batches": float(len(plan[0])),
    }


def loss_rows(sample: Sample) -> int:
    """How many of its tokens carry loss; the head sees no others."""
    return int(np.count_nonzero((sample.stream != 0) & (sample.weight != 0)))


def _fill(lengths: list[int], costs: list[float], token_budget: int, count: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    room, load = np.full(count, token_budget), np.zeros(count)
    for index, length in enumerate(lengths):
        # Empty ones take any length, and are the cheapest.
        fits = (room >= length) | (room == token_budget)
        if not fits.any():
            return None
        chosen = int(np.where(fits, load, np.inf).argmin())
        bins[chosen].append(index)
        room[chosen] -= length
        load[chosen] += costs[index]
    return bins


def _lossless(sample: Sample) -> Sample:
    """Two tokens of context: forward and backward of a rank that has nothing to do, so that collectives still meet."""
    zeros = np.zeros(2, dtype=np.float32)
    ids = np.resize(sample.ids[:2], 2)
    return Sample(ids, np.zeros(2, dtype=np.int8), zeros, zeros, zeros, kind=sample.kind)
