"""One contender of the train-step benchmark in a process of its own: gate, memory, time, phases. Run by train_step.py.

Time: on CUDA events around the update, on the CPU processor time of the process (see loss_measure). Memory: the most
that one update holds beyond weights and optimizer states, which are equal for all; on CUDA the file has the total, too.
The phases are those of one more update, in which the device is synchronised at every border. `forward` of mel_fast
contains the head's gradients, which are computed there; `backward` contains the clipping of gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from benchmarks.loss_measure import free_memory, peak_bytes, seconds_of, summary
from benchmarks.train_step_contenders import Contender, Ours, Plain, Settings
from benchmarks.train_step_gate import BARS, Truth, faults, make_truth, try_out
from benchmarks.train_step_workload import SHAPES, Shape, make_episodes, subset
from mel_fast.distributed import World, join_world, leave
from mel_fast.model import Checkpointing
from mel_fast.types import Episode

ROUNDS = (2, 10)  # at least, at most


def _trl(settings: Settings, *, by_length: bool) -> Contender:
    from benchmarks.train_step_trl import Trl  # needs what may not be installed

    return Trl(settings, by_length=by_length)


CONTENDERS: dict[str, Callable[[Settings], Contender]] = {
    "mel_fast": Ours,
    "trl": partial(_trl, by_length=False),
    "plain, by length": partial(Plain, by_length=True),
    "mel_fast, all sequences": partial(Ours, everything=True),
    "plain": partial(Plain, by_length=False),
    "trl, by length": partial(_trl, by_length=True),
}
PACKAGES_OF_TRL = ("trl", "accelerate", "datasets")


def absent(name: str) -> str:
    """Why a contender cannot take part, or nothing."""
    needed = PACKAGES_OF_TRL if name.startswith("trl") else ()
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def prepare(shape: Shape, workloads: list[str], seed: int, folder: Path, device: torch.device) -> None:
    """The checkpoint that all contenders load, and the truth of every workload."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    with device:  # drawing billions of numbers takes minutes on a CPU
        model: Any = Qwen3ForCausalLM(shape.config())
    model.to(torch.bfloat16).save_pretrained(folder)
    del model
    free_memory(device)
    for workload in workloads:
        truth = make_truth(folder, subset(make_episodes(shape, workload, seed)), device)
        torch.save(asdict(truth), folder / f"{workload}.pt")
        free_memory(device)


def measure(contender: Contender, episodes: list[Episode], truth: Truth, seconds: float) -> dict[str, Any]:
    """The contender's entry for one workload, without its name."""
    device = contender.clock.device
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    errors = try_out(contender, subset(episodes), truth)
    entry: dict[str, Any] = {"errors": asdict(errors)}
    if found := faults(errors, BARS[dtype]):
        return entry | {"status": "gate", "reason": "; ".join(found)}
    run = partial(contender.update, episodes)
    entry["peak_bytes"] = peak_bytes(run, device)  # warms up as well
    if device.type == "cuda":
        entry["peak_bytes_in_all"] = torch.cuda.max_memory_allocated()
    until, times = time.monotonic() + seconds, []
    while len(times) < ROUNDS[0] or (len(times) < ROUNDS[1] and time.monotonic() < until):
        times.append(seconds_of(run, device))
    contender.clock.on = True
    run()
    contender.clock.on = False
    phases = {name: round(1e3 * value, 2) for name, value in contender.clock.seconds.items()}
    contender.clock.seconds.clear()
    return entry | {"status": "ok", **summary(times), "phases_ms": phases}


@contextlib.contextmanager
def world_of(name: str) -> Iterator[World]:
    """mel_fast works in a group of ranks, be it of one; the others know none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = contextlib.nullcontext(World(0, 1, device))
    with join_world("auto", 30) if name.startswith("mel_fast") else alone as world:
        yield world


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("contender", choices=["prepare", *CONTENDERS])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workload", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--checkpointing", choices=get_args(Checkpointing), default="none")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape, name = SHAPES[options.shape], options.contender
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    if name == "prepare":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        prepare(shape, options.workload, options.seed, options.folder, device)
        return
    entries: dict[str, dict[str, Any]] = {}
    with world_of(name) as world:
        model = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in options.model)}
        settings = Settings(options.folder, world, options.token_budget, options.checkpointing, model)
        contender = CONTENDERS[name](settings)
        for workload in options.workload:
            truth = Truth(**torch.load(options.folder / f"{workload}.pt"))
            try:
                found = measure(contender, make_episodes(shape, workload, options.seed), truth, options.seconds)
            except torch.OutOfMemoryError:
                found = {"status": "failed", "reason": "out of memory"}
                contender.optimizer.zero_grad(set_to_none=True)
                free_memory(world.device)
            entries[workload] = found
            options.out.write_text(json.dumps(entries))
        del contender
    leave()


if __name__ == "__main__":
    main()
