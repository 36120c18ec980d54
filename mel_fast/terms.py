"""How the two terms of the loss pull at the parameters: the norms of their gradients, and the cosine between them.

A diagnosis (`optim.term_gradients=true`), not a part of the method: it runs forward and backward once for each term,
beside those of the update, and holds a second copy of the gradients while it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from mel_kernels import LossConfig, Stream
from torch import Tensor
from torch.distributed.tensor import DTensor

from mel_fast.distributed import World
from mel_fast.gspo import SequenceLoss
from mel_fast.packing import PackedBatch
from mel_fast.policy import Policy


def term_gradients(
    policy: Policy, batches: Sequence[PackedBatch], loss: LossConfig | SequenceLoss, world: World
) -> dict[str, float]:
    """Over all parameters, before clipping. Collective; leaves no gradient behind, and changes no parameter.

    Args:
        policy: without gradients, that is between two updates.
        batches: this rank's micro-batches of one update; their weights carry every coefficient.
        loss: coefficients of the surrogate.

    Returns:
        `grad/policy` and `grad/nll`, the norms of the terms' gradients, and `grad/cosine` between them: 1 where both
        want the same, 0 where they do not touch or one of them is zero. The update's gradient is their sum.
    """
    ours, theirs = (_gradients(policy, batches, stream, loss, world) for stream in (Stream.POLICY, Stream.NLL))
    zero = torch.zeros((), dtype=torch.float64)
    sums = {"policy": zero.clone(), "nll": zero.clone(), "dot": zero.clone()}
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            sums["policy"] += a.double().square().sum().cpu()
        if b is not None:
            sums["nll"] += b.double().square().sum().cpu()
        if a is not None and b is not None:
            sums["dot"] += (a.double() * b.double()).sum().cpu()
    whole = world.reduce(sums)  # each rank has its shards
    norms = {name: whole[name] ** 0.5 for name in ("policy", "nll")}
    product = norms["policy"] * norms["nll"]
    return {
        "grad/policy": norms["policy"],
        "grad/nll": norms["nll"],
        "grad/cosine": whole["dot"] / product if product else 0.0,
    }


def _gradients(
    policy: Policy, batches: Sequence[PackedBatch], stream: Stream, loss: LossConfig | SequenceLoss, world: World
) -> list[Tensor | None]:
    """Of one term, this rank's shards."""
    for batch in batches:
        weight = torch.where(batch.stream == int(stream), batch.weight, 0)
        value = policy(replace(batch, weight=weight), loss)[0]
        (value * world.size).backward()  # FSDP averages over ranks; see Learner
    found = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in policy.parameters()]
    policy.zero_grad(set_to_none=True)
    return found
