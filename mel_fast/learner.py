"""The update: packed micro-batches -> gradients -> one optimizer step for each list of samples."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from mel_kernels import LossConfig
from pydantic import BaseModel, ConfigDict, Field
from torch.distributed.tensor import DTensor

from mel_fast.distributed import World
from mel_fast.gspo import SequenceLoss
from mel_fast.memory import explained
from mel_fast.metrics import loss_metrics, saved_metrics
from mel_fast.packing import KINDS, Cost, PackedBatch, balance_metrics, pack
from mel_fast.policy import Policy
from mel_fast.terms import term_gradients
from mel_fast.types import Sample


class OptimConfig(BaseModel):
    """AdamW on float32 master weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(default=1e-6, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's")
    eps: float = Field(default=1e-8, description="AdamW's")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    warmup_steps: int = Field(default=0, ge=0, description="optimizer steps over which the rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="how the rate falls until the end of the run"
    )
    final_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="linear, cosine: share of lr left at the end of the run"
    )
    epochs: int = Field(default=1, ge=1, description="passes over each batch of rollouts")
    token_budget: int = Field(default=16384, ge=2, description="tokens per micro-batch and rank")
    term_gradients: bool = Field(
        default=False,
        description="measure norms and cosine of the two terms' gradients over all parameters; triples the update",
    )

    def lr_at(self, update: int, total: int) -> float:
        """Learning rate of the given optimizer step (from 0) out of `total`."""
        warmup = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        progress = min(1.0, update / max(1, total))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.lr * warmup * (self.final_lr_ratio + (1 - self.final_lr_ratio) * decay[self.schedule])


class Learner:
    """Args:
    policy: on every rank; sharded when there are several.
    reference: the frozen initial policy, when there is a KL term.
    config: the optimizer's settings.
    total_updates: optimizer steps in the whole run, for the schedule.
    """

    def __init__(
        self, policy: Policy, reference: Policy | None, config: OptimConfig, total_updates: int, world: World
    ) -> None:
        self.policy, self.reference, self.config, self.world = policy, reference, config, world
        self.total_updates = total_updates
        self.updates_done = 0
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def update(self, updates: Sequence[Sequence[Sample]] | None, loss: LossConfig | SequenceLoss) -> dict[str, float]:
        """Trains on a batch of rollouts.

        Args:
            updates: on rank 0, the samples of each optimizer step; None on other ranks.
            loss: coefficients of the surrogate.

        Returns:
            The step's metrics, the same on every rank. Without any sample nothing is stepped.

        Raises:
            OutOfMemory: the device's memory did not suffice.
        """
        started = time.perf_counter()
        packed, facts = self._distribute(updates)
        if len(packed) * self.config.epochs > 1:  # later steps are off-policy: fix the old log-probs now
            packed = [[replace(b, old_logp=self._logps(self.policy, b)) for b in batches] for batches in packed]
        if self.reference is not None:
            packed = [[replace(b, ref_logp=self._logps(self.reference, b)) for b in batches] for batches in packed]
        sums: dict[str, torch.Tensor] = {}
        norms: list[float] = []
        pulls: list[dict[str, float]] = []
        for _ in range(self.config.epochs):
            for batches in packed:
                if self.config.term_gradients:
                    with self._explained("the gradients of the terms", max(batches, key=lambda batch: batch.tokens)):
                        pulls.append(term_gradients(self.policy, batches, loss, self.world))
                norms.append(self._step(batches, loss, sums))
        metrics = facts | (loss_metrics(self.world.reduce(sums)) if sums else {})
        for name in pulls[0] if pulls else ():
            metrics[name] = sum(pull[name] for pull in pulls) / len(pulls)
        tokens = sum(batch.tokens for batches in packed for batch in batches) * self.config.epochs
        counts = self.world.reduce({"tokens": torch.tensor(float(tokens))})
        seconds = time.perf_counter() - started
        return metrics | {
            "optim/grad_norm": sum(norms) / len(norms) if norms else 0.0,
            "optim/grad_clipped": sum(norm > self.config.max_grad_norm for norm in norms) / max(1, len(norms)),
            "optim/lr": self.optimizer.param_groups[0]["lr"],
            "optim/updates": float(self.updates_done),
            "perf/train_tokens": counts["tokens"],
            "perf/train_tokens_per_s": counts["tokens"] / seconds,
        }

    def _step(
        self, batches: Sequence[PackedBatch], loss: LossConfig | SequenceLoss, sums: dict[str, torch.Tensor]
    ) -> float:
        for batch in batches:
            with self._explained("the forward", batch):
                value, logp, entropy, metrics = self.policy(batch, loss)
            with self._explained("the backward", batch):
                # FSDP averages gradients over ranks, and the weights already hold the global denominators: undo the
                # average.
                (value * self.world.size).backward()
            for name, metric in (metrics | by_kind(batch, logp, entropy)).items():
                if name not in sums:
                    sums[name] = metric.detach().clone()
                elif name.endswith("max"):
                    sums[name] = torch.maximum(sums[name], metric.detach())
                else:
                    sums[name] += metric.detach()
        with self._explained("the optimizer's step"):
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr_at(self.updates_done, self.total_updates)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates_done += 1
        return norm.item()

    @torch.no_grad()
    def _logps(self, policy: Policy, batch: PackedBatch) -> torch.Tensor:
        with self._explained("the log-probs of the " + ("old" if policy is self.policy else "reference"), batch):
            return policy(batch, None)[1]

    def _explained(self, phase: str, batch: PackedBatch | None = None) -> AbstractContextManager[None]:
        tokens, budget = batch.tokens if batch else 0, self.config.token_budget
        return explained(phase, self.world.rank, tokens, budget, self.policy.settings)

    def _distribute(
        self, updates: Sequence[Sequence[Sample]] | None
    ) -> tuple[list[list[PackedBatch]], dict[str, float]]:
        """Packs on rank 0 and hands each rank its micro-batches, for each non-empty update; and what it saw of them."""
        shares = None
        if self.world.main:
            assert updates is not None
            size, budget, epochs = self.world.size, self.config.token_budget, self.config.epochs
            cost, updates = Cost.of(self.policy.config), [samples for samples in updates if samples]
            plans = [pack(samples, budget, size, cost) for samples in updates]
            in_row = [[batch for plan in plans for batch in plan[rank]] for rank in range(size)]
            facts = balance_metrics(in_row, budget, cost)
            facts |= saved_metrics(updates, epochs, len(updates) * epochs > 1, self.reference is not None)
            shares = [([plan[rank] for plan in plans], facts) for rank in range(size)]
        mine, facts = self.world.scatter(shares)
        return [[batch.to(self.world.device) for batch in batches] for batches in mine], facts


def by_kind(batch: PackedBatch, logp: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the loss rows of each kind of sample: rows, -logp and entropy."""
    result: dict[str, torch.Tensor] = {}
    for index, kind in enumerate(KINDS):
        chosen = (batch.kind == index).to(logp.dtype)
        result[f"kind/{kind}/rows"] = chosen.sum()
        result[f"kind/{kind}/nll"] = -(chosen * logp).sum()
        result[f"kind/{kind}/entropy"] = (chosen * entropy).sum()
    return result
