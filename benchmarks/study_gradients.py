"""Where does each term of the loss pull? Gradients at the warm-started policy, on the episodes of one batch of prompts.

The direction that would help is known in the embedded world: that of the log-prob of the right rule at the place where
a solution names it, over all trained topics. For each term (the surrogate, each form of R_MEL, each control) the norm
of its gradient over all parameters, and the cosines with that direction and with the surrogate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mel_kernels import LossConfig
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.study_arms import Trial
from benchmarks.study_trial import ALONE, probes
from mel_fast import train
from mel_fast.config import parse_arguments
from mel_fast.dumps import load_episodes
from mel_fast.internalise import Internalise, meta_experience_samples
from mel_fast.model import ModelConfig
from mel_fast.objective import build_batch
from mel_fast.packing import collate
from mel_fast.policy import Policy, load_policy
from mel_fast.prompts import Renderer
from mel_fast.tiny.prepare import prepare
from mel_fast.tiny.world import World as TinyWorld
from mel_fast.types import Episode, Sample

WRITTEN = ("retrospective", "conclusion", "heuristic")
"""Forms made of what was written; the filter decides which of it."""
FORMS = (*WRITTEN, "replay", "right", "opening")
BATCHES = 4
"""Steps' worth of prompts behind each figure: 64 prompts of 8 responses."""


def measure(seed: int, work: Path) -> list[dict[str, Any]]:
    """One row per term, for the world of this seed."""
    torch.set_num_threads(1)
    folder = work / "gradients" / str(seed)
    options = [
        *Trial("plain", "MEL", 3e-4, seed, judged=False).options(),
        f"--run.folder={folder}",
        "--run.name=episodes",
        f"--run.steps={BATCHES}",
        "--run.mode=rollout",
        # Those whose replay failed are wanted, too: the filter's part in the gradient is one of the questions.
        "--mel.validate_by_replay=false",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if status := train.main(options):
            raise RuntimeError(f"gradients of seed {seed}: the trainer ended with status {status}, see {log.name}")
    _, config = parse_arguments(options, "study")
    assert config.tiny is not None
    model = prepare(config.tiny, config.prompts, ALONE) / "model"
    renderer = Renderer(AutoTokenizer.from_pretrained(model), config.prompts)
    policy = load_policy(ModelConfig(path=str(model)), ALONE)
    files = sorted((folder / "latest" / "rollouts").glob("*.jsonl"))
    episodes = [episode for file in files for episode in load_episodes(file)]
    helpful = probes(TinyWorld(config.tiny.world), "trained", renderer, config.tiny)["rule"]
    wanted = gradient(policy, helpful) / len(helpful)
    every = dict.fromkeys(FORMS, 0.0)
    surrogate = build_batch(
        episodes,
        config.objective,
        Internalise(),
        0.0,
        config.rollout.max_new_tokens,
        config.rollout.temperature,
        renderer,
    ).updates[0]
    terms = {"surrogate": gradient(policy, surrogate)}
    for name, some, forms in (("", _validated(episodes), FORMS), ("unvalidated", episodes, WRITTEN)):
        for form in forms:
            internalise = Internalise.model_validate(every | {form: 1.0})
            samples, _ = meta_experience_samples(some, internalise, 1.0, renderer)
            terms[f"{form} {name}".strip()] = gradient(policy, samples)
    return [
        {
            "seed": seed,
            "term": term,
            "norm": vector.norm().item(),
            "cosine_helpful": _cosine(vector, wanted),
            "cosine_surrogate": _cosine(vector, terms["surrogate"]),
        }
        for term, vector in terms.items()
    ]


def _validated(episodes: Sequence[Episode]) -> list[Episode]:
    return [
        Episode(
            e.step, e.prompt, e.trajectories, [x for x in e.experiences if x.replay is not None and x.replay.correct]
        )
        for e in episodes
    ]


def gradient(policy: Policy, samples: Sequence[Sample]) -> Tensor:
    """Of the loss of these samples, over all parameters, as one vector (float64)."""
    for start in range(0, len(samples), 128):
        policy(collate(samples[start : start + 128]), LossConfig())[0].backward()
    found = torch.cat([p.grad.double().flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()
