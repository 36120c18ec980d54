"""The update: packed micro-batches -> gradients -> one optimizer step for each list of samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from mel_kernels import LossConfig
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.distributed.tensor import DTensor

from mel_fast.distributed import World
from mel_fast.gspo import SequenceLoss
from mel_fast.guard import Outcome, pulls
from mel_fast.memory import explained
from mel_fast.metrics import loss_metrics, saved_metrics
from mel_fast.packing import J_RLVR, KINDS, Cost, PackedBatch, balance_metrics, pack
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
    nll_lr: float | None = Field(
        default=None,
        gt=0,
        description="peak rate of optimizer steps that R_MEL then has for itself, with AdamW moments and clipping of "
        "its own, after each step of the surrogate; null: one step for the sum of both",
    )
    nll_epochs: int = Field(default=1, ge=1, description="with nll_lr: such steps per batch")
    max_skipped: int = Field(
        default=3, ge=1, description="end the run after so many optimizer steps in a row whose numbers are not finite"
    )
    token_budget: int = Field(default=16384, ge=2, description="tokens per micro-batch and rank")
    term_gradients: bool = Field(
        default=False,
        description="measure norms and cosine of the two terms' gradients over all parameters; triples the update",
    )

    @model_validator(mode="after")
    def _steps_of_its_own(self) -> OptimConfig:
        if self.nll_lr is None and self.nll_epochs > 1:
            raise ValueError("optim.nll_epochs counts the optimizer steps of R_MEL alone: set optim.nll_lr as well")
        if self.nll_lr is not None and self.term_gradients:
            raise ValueError("optim.term_gradients compares the two terms of one step; optim.nll_lr parts them")
        return self

    def lr_at(self, update: int, total: int) -> float:
        """Learning rate of the given optimizer step (from 0) out of `total`."""
        warmup = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        progress = min(1.0, update / max(1, total))
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.lr * warmup * (self.final_lr_ratio + (1 - self.final_lr_ratio) * decay[self.schedule])


@dataclass(frozen=True, slots=True)
class _Step:
    """This rank's micro-batches of one optimizer step."""

    alone: bool  # R_MEL's alone, with its own optimizer
    samples: int  # of all ranks
    batches: list[PackedBatch]

    def to(self, device: torch.device) -> _Step:
        return replace(self, batches=[batch.to(device) for batch in self.batches])

    def with_logps(self, field: str, logps: Callable[[PackedBatch], torch.Tensor]) -> _Step:
        """NLL rows need none, but share their micro-batches with rows that do."""
        if self.alone:
            return self
        return replace(self, batches=[replace(batch, **{field: logps(batch)}) for batch in self.batches])


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
        self.skipped_in_row = 0
        self.stuck = False  # `optim.max_skipped` steps in a row were skipped
        self.outcomes: list[Outcome] = []  # of the last update
        self.optimizer = self._adamw(config.lr)
        self.nll_optimizer = None if config.nll_lr is None else self._adamw(config.nll_lr)

    def update(self, updates: Sequence[Sequence[Sample]] | None, loss: LossConfig | SequenceLoss) -> dict[str, float]:
        """Trains on a batch of rollouts.

        Args:
            updates: on rank 0, the samples of each optimizer step; None on other ranks.
            loss: coefficients of the surrogate.

        Returns:
            The step's metrics, the same on every rank. Without any sample nothing is stepped. An optimizer step whose
            loss or gradient is not finite on any rank is skipped on all: parameters and moments stay as they are.

        Raises:
            OutOfMemory: the device's memory did not suffice.
        """
        started = time.perf_counter()
        steps, samples, facts = self._distribute(updates)
        if sum(not step.alone for step in steps) * self.config.epochs > 1:  # later ones are off-policy: fix the old now
            steps = [step.with_logps("old_logp", partial(self._logps, self.policy)) for step in steps]
        if self.reference is not None:
            steps = [step.with_logps("ref_logp", partial(self._logps, self.reference)) for step in steps]
        sums: dict[str, torch.Tensor] = {}
        self.outcomes = []
        terms: list[dict[str, float]] = []
        for _ in range(self.config.epochs):
            for step, its_samples in zip(steps, samples, strict=True):
                if self.config.term_gradients:
                    largest = max(step.batches, key=lambda batch: batch.tokens)
                    with self._explained("the gradients of the terms", largest):
                        terms.append(term_gradients(self.policy, step.batches, loss, self.world))
                self.outcomes.append(Outcome(its_samples, *self._step(step, loss, sums)))
        metrics = facts | (loss_metrics(self.world.reduce(sums)) if sums else {})
        for name in terms[0] if terms else ():
            metrics[name] = sum(term[name] for term in terms) / len(terms)
        norms = [outcome.norm for outcome in self.outcomes]
        tokens = sum(batch.tokens for step in steps for batch in step.batches) * self.config.epochs
        counts = self.world.reduce({"tokens": torch.tensor(float(tokens))})
        seconds = time.perf_counter() - started
        return metrics | {
            "optim/grad_norm": sum(norms) / len(norms) if norms else 0.0,
            "optim/grad_clipped": sum(norm > self.config.max_grad_norm for norm in norms) / max(1, len(norms)),
            "optim/skipped_updates": float(sum(not outcome.finite for outcome in self.outcomes)),
            "optim/lr": self.optimizer.param_groups[0]["lr"],
            "optim/updates": float(self.updates_done),
            "perf/train_tokens": counts["tokens"],
            "perf/train_tokens_per_s": counts["tokens"] / seconds,
        }

    def _step(
        self, step: _Step, loss: LossConfig | SequenceLoss, sums: dict[str, torch.Tensor]
    ) -> tuple[list[float], float]:
        """The pull of each sample and the norm of the whole gradient, the same on every rank."""
        pulled = torch.zeros(step.samples, dtype=torch.float64, device=self.world.device)
        for batch in step.batches:
            with self._explained("the forward", batch):
                value, logp, entropy, metrics = self.policy(batch, loss)
            with self._explained("the backward", batch):
                # FSDP averages gradients over ranks, and the weights already hold the global denominators: undo the
                # average.
                (value * self.world.size).backward()
            assert self.policy.pull is not None
            pulled.index_add_(0, batch.members, pulls(batch, self.policy.pull / self.world.size, value))
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
            # The gradient holds what all ranks added, so all see the same norm; a loss without one shows in the pulls.
            outcome = self.world.add(pulled), norm.item()
            if Outcome([], *outcome).finite:
                self._optimize(step.alone)
                self.skipped_in_row = 0
            else:
                self.skipped_in_row += 1
                self.stuck = self.stuck or self.skipped_in_row >= self.config.max_skipped
        self.policy.zero_grad(set_to_none=True)
        return outcome

    def _optimize(self, alone: bool) -> None:
        optimizer, rate = self.optimizer, self.config.lr_at(self.updates_done, self.total_updates)
        if alone:
            assert self.nll_optimizer is not None
            assert self.config.nll_lr is not None
            optimizer, rate = self.nll_optimizer, rate * self.config.nll_lr / self.config.lr
        else:
            self.updates_done += 1
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    @torch.no_grad()
    def _logps(self, policy: Policy, batch: PackedBatch) -> torch.Tensor:
        with self._explained("the log-probs of the " + ("old" if policy is self.policy else "reference"), batch):
            return policy(batch, None)[1]

    def _explained(self, phase: str, batch: PackedBatch | None = None) -> AbstractContextManager[None]:
        tokens, budget = batch.tokens if batch else 0, self.config.token_budget
        return explained(phase, self.world.rank, tokens, budget, self.policy.settings)

    def _distribute(
        self, updates: Sequence[Sequence[Sample]] | None
    ) -> tuple[list[_Step], list[Sequence[Sample]], dict[str, float]]:
        """Packs on rank 0 and hands each rank its micro-batches, for each non-empty step; the samples of each, which
        rank 0 alone has; and what it saw of them."""
        shares, parts = None, []
        if self.world.main:
            assert updates is not None
            size, budget, epochs = self.world.size, self.config.token_budget, self.config.epochs
            cost, parts = Cost.of(self.policy.config), [part for samples in updates for part in self._parts(samples)]
            plans = [(alone, pack(samples, budget, size, cost)) for alone, samples in parts]
            in_row = [[batch for _, plan in plans for batch in plan[rank]] for rank in range(size)]
            facts = balance_metrics(in_row, budget, cost)
            old = sum(not alone for alone, _ in parts) * epochs > 1
            facts |= saved_metrics([samples for _, samples in parts], epochs, old, self.reference is not None)
            counts = [len(samples) for _, samples in parts]
            shares = [
                ([_Step(alone, n, plan[rank]) for n, (alone, plan) in zip(counts, plans, strict=True)], facts)
                for rank in range(size)
            ]
        mine, facts = self.world.scatter(shares)
        return [step.to(self.world.device) for step in mine], [part for _, part in parts] or [()] * len(mine), facts

    def _parts(self, samples: Sequence[Sample]) -> list[tuple[bool, Sequence[Sample]]]:
        """(whether it is R_MEL alone, samples) of each optimizer step that an update consists of."""
        if self.nll_optimizer is None:
            parts = [(False, samples)]
        else:
            first = [sample for sample in samples if sample.kind in J_RLVR]
            second = [sample for sample in samples if sample.kind not in J_RLVR]
            parts = [(False, first), *[(True, second)] * self.config.nll_epochs]
        return [(alone, part) for alone, part in parts if part]

    def _adamw(self, lr: float) -> torch.optim.AdamW:
        c = self.config
        return torch.optim.AdamW(
            self.policy.parameters(), lr=lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True
        )


def by_kind(batch: PackedBatch, logp: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the loss rows of each kind of sample: rows, -logp and entropy."""
    result: dict[str, torch.Tensor] = {}
    for index, kind in enumerate(KINDS):
        chosen = (batch.kind == index).to(logp.dtype)
        result[f"kind/{kind}/rows"] = chosen.sum()
        result[f"kind/{kind}/nll"] = -(chosen * logp).sum()
        result[f"kind/{kind}/entropy"] = (chosen * entropy).sum()
    return result
