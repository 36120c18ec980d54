"""The gradients of the two terms are those of an update on one kind of sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from curves import assert_same_curve
from mel_kernels import LossConfig, Stream
from support import random_samples

from mel_fast.distributed import World
from mel_fast.gspo import SequenceLoss
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.packing import collate
from mel_fast.policy import Policy, load_policy
from mel_fast.terms import term_gradients
from mel_fast.types import Sample

Loss = LossConfig | SequenceLoss
LOSSES = {"grpo": LossConfig(entropy_coef=0.01), "gspo": SequenceLoss(3e-4, 4e-4)}


@pytest.fixture
def policy(model_folder: Path, world: World) -> Policy:
    return load_policy(ModelConfig(path=str(model_folder)), world)


def samples_of_a_step() -> list[Sample]:
    """Policy and NLL samples; one response is learnt by both terms, so that they have something in common."""
    samples = random_samples(400)
    both = next(sample for sample in samples if sample.kind == "policy")
    return [*samples, replace(both, kind="replay", stream=np.where(both.stream != 0, Stream.NLL, 0).astype(np.int8))]


def gradient_of(policy: Policy, samples: Sequence[Sample], loss: Loss) -> torch.Tensor:
    """All parameters' gradients end to end, in float64."""
    policy(collate(samples), loss)[0].backward()
    found = torch.cat([p.grad.flatten().double() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    return found


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_norms_and_cosine_are_those_of_each_term_alone(policy: Policy, world: World, loss: Loss) -> None:
    samples = samples_of_a_step()
    rl, nll = (gradient_of(policy, [s for s in samples if (s.kind == "policy") is of], loss) for of in (True, False))
    cosine = torch.nn.functional.cosine_similarity(rl, nll, dim=0).item()
    assert abs(cosine) > 0.01
    micro_batches = [collate(samples[start::3]) for start in range(3)]
    found = term_gradients(policy, micro_batches, loss, world)
    assert found["grad/policy"] == pytest.approx(rl.norm().item(), rel=1e-5)
    assert found["grad/nll"] == pytest.approx(nll.norm().item(), rel=1e-5)
    assert found["grad/cosine"] == pytest.approx(cosine, abs=1e-5)
    whole = gradient_of(policy, samples, loss).norm().item()
    parts = found["grad/policy"] ** 2 + found["grad/nll"] ** 2
    assert whole**2 == pytest.approx(parts + 2 * cosine * found["grad/policy"] * found["grad/nll"], rel=1e-4)
    assert all(p.grad is None for p in policy.parameters())


def test_a_term_without_rows_pulls_nowhere(policy: Policy, world: World) -> None:
    samples = [sample for sample in random_samples(400) if sample.kind == "policy"]
    found = term_gradients(policy, [collate(samples)], LossConfig(), world)
    assert found["grad/policy"] > 0
    assert found["grad/nll"] == found["grad/cosine"] == 0


def test_the_diagnosis_is_in_the_metrics_and_changes_no_bit_of_the_curve(model_folder: Path, world: World) -> None:
    curves = []
    for wanted in (False, True):
        config = OptimConfig(lr=1e-3, token_budget=100, term_gradients=wanted)
        learner = Learner(load_policy(ModelConfig(path=str(model_folder)), world), None, config, 4, world)
        samples = [random_samples(400, seed=step) for step in range(2)]
        curves.append([learner.update([samples[step]], LossConfig()) for step in range(2)])
    assert_same_curve(*curves, tolerance=0)
    assert {"grad/policy", "grad/nll", "grad/cosine"} <= curves[1][0].keys()
    assert "grad/cosine" not in curves[0][0]
