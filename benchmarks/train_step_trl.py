"""TRL in the train-step benchmark: GRPOTrainer's own loss on the recorded trajectories.

    pip install trl==1.16.0   # brings accelerate and psutil

What runs is TRL's code: `GRPOTrainer.compute_loss` with the fused head that the trainer puts on its model, and its
optimizer. What is replaced is the sampling: a batch of trajectories is prepared as `_generate_and_score_completions`
does it, with TRL's own functions. Prompts are padded on the left and completions on the right, to the longest of the
whole batch, shuffled, and split into micro-batches of equal size. The old log-probs are left out, as the trainer leaves
them out when it samples without vLLM.

TRL has no loss for reflections. In the workload `mel` they get the mean negative log-likelihood of the log-probs that
the trainer's `_get_per_token_logps_and_entropies` returns, in micro-batches of their own, sorted by length.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_step_contenders import CLIP, RATE, Clock, Settings
from benchmarks.train_step_workload import GROUP, Item, items, padded_batches, weights
from mel_fast.tiny.texts import corpus
from mel_fast.tiny.tokenizer import build_tokenizer
from mel_fast.types import Episode


class Trl:
    """GRPOTrainer, fed with prepared batches."""

    def __init__(self, settings: Settings, *, by_length: bool) -> None:
        """Args:
        by_length: sort, and pad to the longest of each micro-batch; the trainer does not.
        """
        trl: Any = importlib.import_module("trl")
        datasets: Any = importlib.import_module("datasets")
        self.utils: Any = importlib.import_module("trl.trainer.utils")
        self.settings, self.by_length = settings, by_length
        cuda = settings.bfloat16
        config = trl.GRPOConfig(
            output_dir=str(settings.folder / "trl"),
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            loss_type="grpo",
            beta=0.0,
            learning_rate=RATE,
            weight_decay=0.0,
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=settings.checkpointing != "none",
            model_init_kwargs={"dtype": "float32"},
            report_to=[],
        )
        self.trainer = trl.GRPOTrainer(
            model=str(settings.folder),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["unused"]}),
            processing_class=build_tokenizer(corpus()),
        )
        self.model: nn.Module = self.trainer.model.to(settings.world.device).train()
        if settings.checkpointing != "none":  # the trainer does it when training starts
            self.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer: torch.optim.Optimizer = self.trainer.create_optimizer()
        self.clock = Clock(settings.world.device)

    def update(self, episodes: Sequence[Episode]) -> tuple[float, float]:
        self.clock.enter("pack")
        work = items(episodes)
        policy, memos = [i for i in work if i.policy], [i for i in work if not i.policy]
        batches = self._split(policy)
        self.trainer.current_gradient_accumulation_steps = len(batches)
        total = torch.zeros((), device=self.settings.world.device)
        for batch in batches:
            self.clock.enter("forward")
            total += self._backward(self.trainer.compute_loss(self.model, batch))
        memos.sort(key=lambda item: -item.length)
        share = weights(memos)
        for chosen in padded_batches([item.length for item in memos], self.settings.token_budget):
            self.clock.enter("pack")
            batch = self._pad([memos[i] for i in chosen])
            weight = torch.tensor([share[i] for i in chosen], device=self.settings.world.device)[:, None]
            self.clock.enter("forward")
            total += self._backward(-(weight * batch["completion_mask"] * self._logps(batch)).sum())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.clock.enter("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.enter("")
        return total.item(), norm.item()

    def _backward(self, loss: Tensor) -> Tensor:
        self.clock.enter("backward")
        self.trainer.accelerator.backward(loss)
        return loss.detach()

    def _pad(self, work: Sequence[Item]) -> dict[str, Tensor]:
        """As `_generate_and_score_completions`: prompts to the longest on the left, completions on the right."""
        batch: dict[str, Tensor] = {"advantages": torch.tensor([item.advantage for item in work])}
        parts = (("prompt", "left", [i.context for i in work]), ("completion", "right", [i.target for i in work]))
        for name, side, ids in parts:
            rows = [torch.tensor(each) for each in ids]
            batch[f"{name}_ids"] = self.utils.pad(rows, padding_value=0, padding_side=side)
            ones = [torch.ones_like(row) for row in rows]
            batch[f"{name}_mask"] = self.utils.pad(ones, padding_value=0, padding_side=side)
        return {name: value.to(self.settings.world.device) for name, value in batch.items()}

    def _split(self, work: Sequence[Item]) -> list[dict[str, Tensor]]:
        """Equal micro-batches, the largest that the token budget allows for the longest prompt and completion."""
        length = max(len(item.context) for item in work) + max(len(item.target) for item in work)
        sizes = [n for n in range(1, len(work) + 1) if len(work) % n == 0]
        size = max(n for n in sizes if n == 1 or n * length <= self.settings.token_budget)
        if self.by_length:
            work = sorted(work, key=lambda item: -item.length)
            return [self._pad(work[start : start + size]) for start in range(0, len(work), size)]
        batch = self._pad(work)
        return self.utils.split_tensor_dict(self.utils.shuffle_sequence_dict(batch), len(work) // size)

    def _logps(self, batch: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        keep = batch["completion_ids"].shape[1]
        return self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, keep)[0]
