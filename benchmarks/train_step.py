"""How long does the update of a training step take, and with how much memory?

    python -m benchmarks.train_step                          # Qwen3-4B's shape on CUDA, a tiny one on the CPU
    python -m benchmarks.train_step --shape tiny --workload mel --only mel_fast
    python -m benchmarks.train_step --shape 4b --budget-seconds 480

The same recorded trajectories (train_step_workload) for every contender (train_step_contenders, train_step_trl), each
in a process of its own (train_step_trial), after a gate against a reference (train_step_gate). Writes a JSON file, and
from it a table and a plot (train_step_report).

Figures. `tokens/s`: tokens of the workload, each once and without padding, over the time of the update; equal for all,
so ratios are those of times. `FLOP/s`: the FLOPs that the step needs over the time; model FLOPs utilisation (MFU) is
their share of the device's peak. Needed are, for each sequence with a gradient, of L tokens, N of them with loss,

    6 x (weights of the blocks' matrices) x L  +  6 x layers x heads x head_dim x L^2  +  6 x hidden x vocab x N

that is three times `mel_fast.packing.Cost`: 2 FLOPs per weight and token forward and 4 backward; of attention's two
products the causal half; the head on rows with loss only. What a contender computes beyond that (padding, sequences of
advantage 0, recomputation under gradient checkpointing) does not count. The peak is 989e12, dense bf16 of H100 and H200
by NVIDIA's data sheets; on other devices no MFU is given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.loss_measure import load_average, machine
from benchmarks.train_step_gate import BARS
from benchmarks.train_step_report import markdown_table, write
from benchmarks.train_step_trial import CONTENDERS, absent
from benchmarks.train_step_workload import SHAPES, WORKLOADS, Item, Shape, describe, items, make_episodes
from mel_fast.model import Checkpointing
from mel_fast.packing import Cost

PEAKS = {"H100": 989e12, "H200": 989e12}
# On the CPU. glibc gives large blocks back to the system and fetches them again, until it has seen a few: without these
# bounds that costs those who allocate most up to a fifth of their time, and which workload comes first decides it.
ON_CPU = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


@dataclass(frozen=True)
class Plan:
    """What to run."""

    shape: str
    workloads: Sequence[str]
    contenders: Sequence[str]
    token_budget: int
    checkpointing: Checkpointing
    model: Sequence[str] = ()  # KEY=VALUE: further settings of mel_fast's model
    seed: int = 0
    seconds: float = 5.0  # of timing, per contender and workload
    deadline: float = float("inf")  # on time.monotonic


def needed_flops(work: Sequence[Item], shape: Shape) -> float:
    """Of forward and backward; see the module's docstring."""
    cost = Cost.of(shape.config())
    return 3 * sum(cost.of_sequence(item.length, len(item.target)) for item in work if item.advantage != 0)


def run_all(plan: Plan, path: Path, command: str) -> dict[str, Any]:
    """All contenders in turn; the file is complete after each."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # as the trials do
    device = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shape = SHAPES[plan.shape]
    report: dict[str, Any] = {
        "benchmark": "train step",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "device": device,
        "peers": {package: _version(package) for package in ("trl", "accelerate", "liger-kernel", "flash-attn")},
        "shape": plan.shape,
        "dtype": "bfloat16" if device["kind"] == "cuda" else "float32",
        "token_budget": plan.token_budget,
        "checkpointing": plan.checkpointing,
        "seed": plan.seed,
        "peak_flops": next((peak for name, peak in PEAKS.items() if name in str(device["name"])), None),
        "workloads": [],
    }
    report["bars"] = BARS[report["dtype"]].__dict__
    for workload in plan.workloads:
        work = items(make_episodes(shape, workload, plan.seed))
        found = {"name": workload, **describe(work), "needed_flops": needed_flops(work, shape), "contenders": []}
        report["workloads"].append(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if error := _child(plan, "prepare", folder, folder / "none"):
            sys.exit(f"the checkpoint and the reference could not be made: {error}")
        for name in plan.contenders:
            load, out = load_average(), folder / "out.json"
            out.unlink(missing_ok=True)
            why = absent(name)
            failure = "" if why else _child(plan, name, folder, out)
            entries = json.loads(out.read_text()) if out.exists() else {}
            for found in report["workloads"]:
                missing = {"status": "absent" if why else "failed", "reason": why or failure}
                entry = _rates(entries.get(found["name"], missing), found)
                found["contenders"].append({"name": name, "load_average": [load, load_average()], **entry})
            path.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{name}: " + ", ".join(f"{f['name']} {_brief(f['contenders'][-1])}" for f in report["workloads"]))
    print(f"\n{markdown_table(report)}")
    return report


def _child(plan: Plan, name: str, folder: Path, out: Path) -> str:
    """Runs one process. Returns why it failed, or nothing."""
    if (left := plan.deadline - time.monotonic()) <= 0:
        return "the budget is spent"
    command = [sys.executable, "-m", "benchmarks.train_step_trial", name, plan.shape, str(folder), "--out", str(out)]
    command += [part for workload in plan.workloads for part in ("--workload", workload)]
    command += ["--seed", str(plan.seed), "--token-budget", str(plan.token_budget), "--seconds", str(plan.seconds)]
    command += ["--checkpointing", plan.checkpointing, *(part for each in plan.model for part in ("--model", each))]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=None if left == float("inf") else left,
            env=os.environ | ({} if torch.cuda.is_available() else ON_CPU),
        )
    except subprocess.TimeoutExpired:
        return "not finished within the budget"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]


def _rates(entry: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
    if entry["status"] != "ok":
        return entry
    seconds = entry["median_ms"] / 1e3
    return entry | {
        "tokens_per_s": round(workload["tokens"] / seconds, 1),
        "flops_per_s": round(workload["needed_flops"] / seconds),
    }


def _brief(entry: dict[str, Any]) -> str:
    return f"{entry['median_ms']:.0f} ms" if entry["status"] == "ok" else f"{entry['status']} ({entry['reason']})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="4b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--workload", choices=WORKLOADS, help="default: both")
    parser.add_argument("--token-budget", type=int, help="per micro-batch; default: the shape's")
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="default: all; may be repeated")
    parser.add_argument("--budget-seconds", type=float, help="stop after about this long; what is missed is named")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, per contender and workload")
    parser.add_argument("--checkpointing", choices=get_args(Checkpointing), help="default: full on CUDA, else none")
    parser.add_argument("--model", action="append", default=[], help="KEY=VALUE of mel_fast's model.*; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train-step-<device>-<shape>-<date>.json")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    plan = Plan(
        shape=options.shape,
        workloads=[options.workload] if options.workload else WORKLOADS,
        contenders=options.only or list(CONTENDERS),
        token_budget=options.token_budget or SHAPES[options.shape].token_budget,
        checkpointing=options.checkpointing or ("full" if cuda else "none"),
        model=options.model,
        seed=options.seed,
        seconds=options.seconds,
        deadline=time.monotonic() + options.budget_seconds if options.budget_seconds else float("inf"),
    )
    name = f"train-step-{'cuda' if cuda else 'cpu'}-{options.shape}-{datetime.datetime.now(datetime.UTC).date()}.json"
    path = options.out or Path(__file__).parent / "results" / name
    run_all(plan, path, shlex.join(["python", "-m", "benchmarks.train_step", *sys.argv[1:]]))
    print("written: " + ", ".join(map(str, [path, *write(path)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
