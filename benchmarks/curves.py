"""Is the training curve the same, however it is computed?

    python -m benchmarks.curves                                            # CPU; CUDA too, where there is one
    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 -m benchmarks.curves     # the same on two ranks

Trains a small model with random weights on recorded MEL steps (train_step_workload, shape `tiny`, one seed per step) in
every way that this machine offers, and compares loss, entropy and gradient norms of each step with a reference: one
rank on the CPU, float32, eager, padded attention, nothing recomputed. Prints the largest relative deviation over all
steps, and writes it to a JSON file with device, versions and command. The exit status is 1 when a way misses its bound.
Bounds of bfloat16 on CUDA are set without a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.loss_measure import machine
from benchmarks.train_step_workload import SHAPES, make_episodes
from mel_fast.distributed import World, join_world, leave
from mel_fast.internalise import Internalise
from mel_fast.learner import Learner, OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.objective import ObjectiveConfig, build_batch
from mel_fast.policy import load_policy
from mel_fast.types import Sample

COMPARED: tuple[str, ...] = ("loss/nll", "policy/entropy", "optim/grad_norm", "grad/head_policy", "grad/head_nll")
BUDGET = 2048
SAME, COMPILED, BF16 = 1e-5, 1e-4, 5e-2  # bounds


@dataclass(frozen=True)
class Way:
    """One way to compute the same updates."""

    name: str
    bound: float
    settings: dict[str, Any] = field(default_factory=dict)  # of ModelConfig
    budget: int = BUDGET


def ways(device: torch.device) -> list[Way]:
    """All that can run here."""
    found = [Way(f"{device.type}, float32", SAME if device.type == "cpu" else 1e-3)]
    if device.type == "cpu":
        found += [
            Way("a quarter of the token budget", SAME, budget=BUDGET // 4),
            Way("selective checkpointing", SAME, {"checkpointing": "selective"}),
            Way("full checkpointing", SAME, {"checkpointing": "full"}),
            Way("offload", SAME, {"offload": True}),
            Way("bfloat16", BF16, {"dtype": "bfloat16"}),
        ]
        if shutil.which("g++"):
            found.append(Way("compiled", COMPILED, {"compile": True}))
        return found
    plain = {"dtype": "bfloat16", "liger": False}
    found += [
        Way(f"cuda, bfloat16, {attention}", BF16, plain | {"attention": attention})
        for attention in ("padded", "varlen", *(["flash"] if importlib.util.find_spec("flash_attn") else []))
    ]
    if importlib.util.find_spec("liger_kernel"):
        found.append(Way("cuda, bfloat16, Liger", BF16, plain | {"liger": True}))
    for name, changes in (
        ("compiled", {"compile": True}),
        ("selective checkpointing", {"checkpointing": "selective"}),
        ("full checkpointing", {"checkpointing": "full"}),
        ("compiled, selective checkpointing", {"compile": True, "checkpointing": "selective"}),
        ("offload", {"offload": True}),
    ):
        found.append(Way(f"cuda, bfloat16, {name}", BF16, plain | changes))
    return found


def samples_of(step: int) -> list[Sample]:
    episodes, no_renderer = make_episodes(SHAPES["tiny"], "mel", step), cast("Any", None)
    return build_batch(episodes, ObjectiveConfig(), Internalise(), 1.0, 1, 1.0, no_renderer).updates[0]


def curve(way: Way, folder: Path, world: World, steps: int) -> list[dict[str, float]]:
    torch._dynamo.reset()
    policy = load_policy(ModelConfig.model_validate({"path": str(folder)} | way.settings), world)
    learner = Learner(policy, None, OptimConfig(lr=1e-3, token_budget=way.budget), steps, world)
    loss = ObjectiveConfig().loss
    return [learner.update([samples_of(step)] if world.main else None, loss) for step in range(steps)]


def deviations(ours: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, float]:
    """The largest of all steps, relative; not a number is infinitely far."""
    found: dict[str, float] = {}
    for name in COMPARED:
        errors = [abs(a[name] / b[name] - 1) for a, b in zip(ours, reference, strict=True)]
        found[name] = max(math.inf if math.isnan(error) else error for error in errors)
    return found


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(SHAPES["tiny"].config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3.0)  # at the usual scale attention is nearly uniform, whatever the mask
    model.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="only ways whose name contains this")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/curves-<device>-<ranks>-<date>.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    disable_progress_bar()
    missed = 0
    with join_world("auto", 30) as world, tempfile.TemporaryDirectory() as scratch:
        folder = Path(world.broadcast(scratch))
        if world.main:
            save_model(folder)
        world.barrier()
        alone = World(0, 1, torch.device("cpu"))
        reference = curve(Way("reference", 0.0), folder, alone, options.steps)
        rows: list[dict[str, Any]] = []
        for way in ways(world.device):
            if options.only not in way.name:
                continue
            found = deviations(curve(way, folder, world, options.steps), reference)
            missed += not max(found.values()) <= way.bound
            rows.append({"way": way.name, "bound": way.bound, "deviations": found})
            if world.main:
                cells = " | ".join(f"{value:.1e}" for value in found.values())
                heading = f"| {world.size} rank(s) | bound | {' | '.join(COMPARED)} |\n|---|{'---:|' * 6}\n"
                print(f"{heading if len(rows) == 1 else ''}| {way.name} | {way.bound:.0e} | {cells} |", flush=True)
        if world.main:
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            name = f"curves-{world.device.type}-{world.size}-{date}.json"
            path = options.out or Path(__file__).parent / "results" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            report = {"benchmark": "curves", "date": date, "ranks": world.size, "steps": options.steps}
            report |= {"command": shlex.join(["python", "-m", "benchmarks.curves", *sys.argv[1:]])}
            report |= {"device": machine(world.device), "rows": rows, "reference": reference}
            path.write_text(json.dumps(report, indent=1) + "\n")
            print(f"written: {path}; {missed} of {len(rows)} miss their bound")
    return 1 if missed else 0


if __name__ == "__main__":
    status = main()
    leave()
    sys.exit(status)
