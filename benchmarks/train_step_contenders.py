"""Who takes part in the train-step benchmark: mel_fast, and plain PyTorch on padded batches. TRL: train_step_trl.

All train the same step: the same float32 weights, AdamW (fused, gradients clipped at a norm that is never reached, a
learning rate that changes nothing), the same token budget per micro-batch, gradient checkpointing alike. On CUDA all
compute in bfloat16: mel_fast by FSDP2's mixed precision, the others by autocast.

B sequences of a micro-batch, L longest of them, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from mel_kernels import Stream
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.train_step_workload import Item, items, padded_batches, weights
from mel_fast.distributed import World
from mel_fast.internalise import Internalise
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import Checkpointing, ModelConfig
from mel_fast.objective import ObjectiveConfig, build_batch
from mel_fast.policy import load_policy
from mel_fast.types import Episode, Sample, make_sample

RATE, CLIP = 1e-12, 1e9


@dataclass
class Clock:
    """Where the time of an update goes. Off unless told otherwise, because it synchronises the device."""

    device: torch.device
    on: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _since: float = 0.0

    def enter(self, phase: str) -> None:
        """Ends the phase before; the empty name ends the last."""
        if not self.on:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter() if self.device.type == "cuda" else time.process_time()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


@dataclass(frozen=True)
class Settings:
    """What every contender is told."""

    folder: Path  # the checkpoint
    world: World
    token_budget: int
    checkpointing: Checkpointing  # only mel_fast has `selective`; the others take it for `full`
    model: dict[str, Any] = field(default_factory=dict)  # further settings of mel_fast's `ModelConfig`

    @property
    def bfloat16(self) -> bool:
        return self.world.device.type == "cuda"


class Contender(Protocol):
    """A trainer that has loaded its model."""

    clock: Clock

    @property
    def model(self) -> nn.Module:
        """The transformers model, whose parameters have their usual names."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def update(self, episodes: Sequence[Episode]) -> tuple[float, float]:
        """One optimizer step. Returns the loss and the norm of its gradient."""
        ...


class Ours:
    """Samples, packing, update: what `train.py` does with a step's episodes."""

    def __init__(self, settings: Settings, *, everything: bool = False) -> None:
        """Args:
        everything: train sequences of advantage 0, too.
        """
        world, self.everything = settings.world, everything
        config = {
            "path": str(settings.folder),
            "dtype": "bfloat16" if settings.bfloat16 else "float32",
            "checkpointing": settings.checkpointing,
        }
        policy = load_policy(ModelConfig.model_validate(config | settings.model), world)
        optim = OptimConfig(lr=RATE, max_grad_norm=CLIP, token_budget=settings.token_budget)
        self.learner = Learner(policy, None, optim, 1, world)
        self.model, self.optimizer = policy.model, self.learner.optimizer
        self.clock = Clock(world.device)
        policy.register_forward_pre_hook(lambda *_: self.clock.enter("forward"))
        policy.register_forward_hook(lambda *_: self.clock.enter("backward"))
        self.optimizer.register_step_pre_hook(lambda *_: self.clock.enter("optimizer"))
        self.optimizer.register_step_post_hook(lambda *_: self.clock.enter("rest"))

    def update(self, episodes: Sequence[Episode]) -> tuple[float, float]:
        self.clock.enter("pack")
        objective = ObjectiveConfig()
        no_renderer = cast("Any", None)  # the paper's form of experience renders nothing
        batch = build_batch(episodes, objective, Internalise(), 1.0, 1, 1.0, no_renderer)
        updates = batch.updates
        if self.everything:
            updates = [updates[0] + _without_advantage(items(episodes))]
        metrics = self.learner.update(updates, objective.loss)
        self.clock.enter("")
        return metrics["loss/total"], metrics["optim/grad_norm"]


def _without_advantage(work: Sequence[Item]) -> list[Sample]:
    pairs = zip(work, weights(work), strict=True)
    return [make_sample(i.context, i.target, Stream.POLICY, w, "policy") for i, w in pairs if i.advantage == 0]


class Plain:
    """transformers, padded batches, full logits, log-softmax in float32, autograd."""

    def __init__(self, settings: Settings, *, by_length: bool) -> None:
        """Args:
        by_length: sort before cutting into micro-batches, which is the best that padding can do.
        """
        self.settings, self.by_length, device = settings, by_length, settings.world.device
        model: Any = AutoModelForCausalLM.from_pretrained(settings.folder, dtype=torch.float32)
        self.model = model.to(device).train()
        if settings.checkpointing != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
        self.clock = Clock(device)

    def update(self, episodes: Sequence[Episode]) -> tuple[float, float]:
        self.clock.enter("pack")
        work = items(episodes)
        share = weights(work)
        order = sorted(range(len(work)), key=lambda i: -work[i].length) if self.by_length else range(len(work))
        batches = padded_batches([work[i].length for i in order], self.settings.token_budget)
        total = torch.zeros((), device=self.settings.world.device)
        for batch in batches:
            chosen = [order[place] for place in batch]
            self.clock.enter("pack")
            tensors = self._pad([work[i] for i in chosen], [share[i] for i in chosen])
            self.clock.enter("forward")
            loss = self._loss(*tensors)
            self.clock.enter("backward")
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.clock.enter("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.enter("")
        return total.item(), norm.item()

    def _pad(self, work: Sequence[Item], share: Sequence[float]) -> tuple[Tensor, ...]:
        """ids, attention mask, advantage, weight, policy: all [B, L], padded on the right."""
        columns: list[list[Tensor]] = [[], [], [], [], []]
        for item, weight in zip(work, share, strict=True):
            target = torch.arange(item.length) >= len(item.context)
            columns[0].append(torch.tensor(item.context + item.target))
            columns[1].append(torch.ones(item.length, dtype=torch.long))
            columns[2].append(target * item.advantage)
            columns[3].append(target * weight)
            columns[4].append(target & item.policy)
        padded = (nn.utils.rnn.pad_sequence(column, batch_first=True) for column in columns)
        return tuple(each.to(self.settings.world.device) for each in padded)

    def _loss(self, ids: Tensor, mask: Tensor, advantage: Tensor, weight: Tensor, policy: Tensor) -> Tensor:
        autocast = torch.autocast(ids.device.type, torch.bfloat16)
        with autocast if self.settings.bfloat16 else contextlib.nullcontext():
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logp = F.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]  # [B, L - 1]
        advantage, weight, policy = advantage[:, 1:], weight[:, 1:], policy[:, 1:]
        ratio = (logp - logp.detach()).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -(weight * torch.where(policy, surrogate, logp)).sum()
