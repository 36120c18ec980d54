"""Training curves on fixed samples, in this process or on several ranks at once: what must not depend on how a model is
computed is compared on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from mel_kernels import LossConfig
from support import random_samples, torchrun
from torch._dynamo.utils import counters

from mel_fast.checkpoint import checkpoints, export_model, load_checkpoint, save_checkpoint
from mel_fast.distributed import World
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.policy import load_policy
from mel_fast.setup import load_tokenizer

SCRIPT = str(Path(__file__).parent / "ranks" / "updates.py")
COMPARED = (
    "loss/total",
    "loss/policy",
    "loss/nll",
    "optim/grad_norm",
    "grad/head_policy",
    "grad/head_nll",
    "policy/entropy",
)
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One run of a few updates."""

    model: str  # a folder
    settings: dict[str, Any] = field(default_factory=dict)  # of ModelConfig
    optim: dict[str, Any] = field(default_factory=dict)  # of OptimConfig
    steps: tuple[int, int] = (0, 4)
    kl: float = 0.0
    load: str | None = None  # folder of checkpoints, to go on from the newest
    save: str | None = None  # the same, to write one at the end
    export: str | None = None
    alone: bool = False  # on rank 0 only, as a world of one
    compiler: str = "inductor"  # of torch.compile


def train(case: Case, world: World) -> Curve:
    """The metrics of every step, in a fresh learner; `test/graphs` counts what torch.compile made so far."""
    torch._dynamo.reset()
    counters.clear()
    config = ModelConfig.model_validate({"path": case.model} | case.settings)
    with patch.object(torch, "compile", partial(torch.compile, backend=case.compiler)):
        policy = load_policy(config, world)
    reference = load_policy(config, world) if case.kl else None
    optim = OptimConfig.model_validate({"lr": 1e-3, "token_budget": 100} | case.optim)
    learner = Learner(policy, reference, optim, 4, world)
    if case.load:
        load_checkpoint(checkpoints(Path(case.load))[-1], learner)
    curve: Curve = []
    for step in range(*case.steps):
        # Once fewer micro-batches than ranks, once two updates per batch.
        samples = random_samples(400, seed=step, count=3 if step == 1 else 12)
        for sample in samples:
            sample.weight *= 10
        updates = [samples[:6], samples[6:]] if step == 2 else [samples]
        metrics = learner.update(updates if world.main else None, LossConfig(kl_coef=case.kl))
        curve.append(metrics | {"test/graphs": counters["stats"]["unique_graphs"]})
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    if case.save:
        save_checkpoint(Path(case.save), case.steps[1], learner, {"note": "kept"}, 2, world)
    if case.export:
        export_model(Path(case.export), policy, load_tokenizer(config), world)
    return curve


def on_ranks(ranks: int, cases: dict[str, Case], out: Path) -> dict[str, Curve]:
    """All cases one after the other, in one group of real processes."""
    given = json.dumps({name: asdict(case) for name, case in cases.items()})
    result = torchrun(ranks, SCRIPT, given, str(out))
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


def assert_same_curve(ours: Curve, theirs: Curve, tolerance: float = 1e-6, names: Sequence[str] = COMPARED) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), f"step {step}: {name}"
