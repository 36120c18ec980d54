"""Run by torchrun: some updates on fixed samples; rank 0 writes the metrics of each.

updates.py MODEL OUT --steps N [--budget T] [--checkpoint FOLDER] [--load FOLDER] [--kl C] [--settings JSON]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from mel_kernels import LossConfig
from torch._dynamo.utils import counters

from mel_fast.checkpoint import checkpoints, export_model, load_checkpoint, save_checkpoint
from mel_fast.distributed import join_world, leave
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.policy import load_policy
from mel_fast.setup import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import random_samples


def main(options: argparse.Namespace) -> None:
    with join_world("cpu", 5) as world:
        config = ModelConfig.model_validate({"path": options.model} | options.settings)
        policy = load_policy(config, world)
        reference = load_policy(config, world) if options.kl else None
        learner = Learner(policy, reference, OptimConfig(lr=1e-3, token_budget=options.budget), 4, world)
        if options.load:
            load_checkpoint(checkpoints(options.load)[-1], learner)
        lines = []
        for step in range(*options.steps):
            samples = random_samples(
                400, seed=step, count=3 if step == 1 else 12
            )  # once fewer micro-batches than ranks
            for sample in samples:
                sample.weight *= 10
            updates = [samples[:6], samples[6:]] if step == 2 else [samples]  # once two updates per batch
            metrics = learner.update(updates if world.main else None, LossConfig(kl_coef=options.kl))
            lines.append(metrics | {"test/graphs": counters["stats"]["unique_graphs"]})  # that torch.compile made
            if step == options.steps[0]:
                assert all(torch.isfinite(p).all() for p in policy.parameters())
        if options.save:
            save_checkpoint(options.save, options.steps[1], learner, {"note": "kept"}, 2, world)
        if options.export:
            export_model(options.export, policy, load_tokenizer(config), world)
        if world.main:
            options.out.write_text(json.dumps(lines))


parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, nargs=2, default=(0, 4))
parser.add_argument("--budget", type=int, default=100)
parser.add_argument("--save", type=Path)
parser.add_argument("--load", type=Path)
parser.add_argument("--export", type=Path)
parser.add_argument("--kl", type=float, default=0.0)
parser.add_argument("--settings", type=json.loads, default={}, help="of ModelConfig, as JSON")
main(parser.parse_args())
leave()
