"""The truth of the train-step benchmark: loss and gradient of a few groups, sequence by sequence, with full logits.

No padding, no packing, no kernels: on the CPU in float64, on CUDA in float32 (without TF32). A contender whose loss,
gradient norm or gradient miss their bar on these groups gets no time. The bars for bfloat16 are wide: they catch a
wrong weight, mask or denominator, not a lack of precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from benchmarks.train_step_contenders import Contender
from benchmarks.train_step_workload import items, weights
from mel_fast.types import Episode

ENTRIES = 2**22  # of each watched gradient, from its start


@dataclass(frozen=True)
class Errors:
    """Of the loss (over the larger of 1 and the loss), of the gradient's norm (relative), and of the direction of the
    worst of the watched gradients (1 - cosine)."""

    loss: float
    norm: float
    angle: float


BARS = {"float32": Errors(1e-5, 1e-4, 1e-6), "bfloat16": Errors(1e-2, 3e-2, 1e-2)}


@dataclass(frozen=True)
class Truth:
    """Loss, norm of the gradient over all parameters, and the gradients of some of them."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def watched(model: nn.Module) -> dict[str, nn.Parameter]:
    """The first and the last matrix of the blocks, and the embeddings, which are the head as well."""
    named = dict(model.named_parameters())
    last = max(int(name.split(".")[2]) for name in named if name.startswith("model.layers."))
    chosen = ("layers.0.self_attn.q_proj", f"layers.{last}.mlp.down_proj", "embed_tokens")
    return {name: named[f"model.{name}.weight"] for name in chosen}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in watched(model).items():
        assert parameter.grad is not None
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = whole.detach().flatten()[:ENTRIES].double().cpu()
    return found


def make_truth(folder: Path, episodes: Sequence[Episode], device: torch.device) -> Truth:
    """Sequence by sequence. On-policy the surrogate's gradient is that of advantage x log-prob, and its value minus the
    advantage."""
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).train()
    work = items(episodes)
    value = 0.0
    for item, weight in zip(work, weights(work), strict=True):
        ids = torch.tensor([item.context + item.target], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(item.context) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, ids[0, len(item.context) :, None])  # [target, 1]
        loss = -weight * item.advantage * logp.sum()
        loss.backward()
        value += -weight * item.advantage * len(item.target) if item.policy else loss.item()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    return Truth(value, norm, gradients(model))


def try_out(contender: Contender, episodes: Sequence[Episode], truth: Truth) -> Errors:
    """One update of the contender on the gate's groups; its gradients are looked at as the optimizer gets them."""
    seen: dict[str, Tensor] = {}
    hook = contender.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(contender.model)))
    loss, norm = contender.update(episodes)
    hook.remove()
    cosines = [
        torch.nn.functional.cosine_similarity(seen[name], true, dim=0).item() for name, true in truth.gradients.items()
    ]
    return Errors(
        loss=abs(loss - truth.loss) / max(1.0, abs(truth.loss)),
        norm=abs(norm / truth.norm - 1),
        angle=1 - min(cosines),
    )


def faults(errors: Errors, bars: Errors) -> list[str]:
    """What misses its bar, in words; nothing when the gate is green. Not a number is no agreement."""
    named = {"loss": "loss", "norm": "gradient norm", "angle": "gradient direction"}
    return [
        f"{words} error {getattr(errors, name):.1e} above {getattr(bars, name):.0e}"
        for name, words in named.items()
        if not getattr(errors, name) <= getattr(bars, name)
    ]
