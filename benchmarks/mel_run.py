"""Does the whole method run and learn on this device, and where does its time go?

    python -m benchmarks.mel_run                                  # five minutes at most, on CUDA in bfloat16
    python -m benchmarks.mel_run --seconds 120 --run.steps=8      # in miniature, on any machine

Runs `mel_fast.train` in the embedded world (configs/tiny.yaml; further settings as there) with a model that a GPU's
kernels can take: bfloat16 compute with float32 master weights under FSDP2, packed varlen attention, the Triton head,
MEL in every step. After the time is up the run is ended; what it has done is judged, and written to a JSON file with
device, versions and command. The exit status is 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_measure import machine
from mel_fast.dumps import read_jsonl

ON_CUDA = ("--run.device=cuda", "--model.dtype=bfloat16", "--rollout.dtype=bfloat16")
MODULE = ["-m", "mel_fast.train"]
PHASES = ("collect", "build_batch", "update", "publish")
FEWEST = 4  # steps that can be judged
# nats: mean difference of a log-prob in engine and trainer, in bfloat16 (a guess, no GPU has been seen) and in float32
GAP = {"cuda": 0.1, "cpu": 1e-4}


def faults(steps: Sequence[dict[str, float]], kind: str) -> list[str]:
    """What is wrong with the steps of a run, in words; nothing when all is well.

    Args:
        steps: their metrics.
        kind: "cuda" or "cpu".
    """
    if len(steps) < FEWEST:
        return [f"{len(steps)} steps were finished, at least {FEWEST} are needed to judge"]
    found: list[str] = []
    for name in ("loss/total", "optim/grad_norm"):
        if bad := [step["step"] for step in steps if not math.isfinite(step.get(name, math.nan))]:
            found.append(f"{name} is not finite in steps {bad}")
    if bad := [step["step"] for step in steps if step.get("policy/ratio_max", 1.0) != 1.0]:
        found.append(f"the importance ratio is not 1, though all is on-policy, in steps {bad}")
    if (gap := max(step.get("policy/rollout_gap", 0.0) for step in steps)) > GAP[kind]:
        found.append(f"log-probs of engine and trainer differ by {gap:.2g} on average, more than {GAP[kind]:g}")
    if sum(step["mel/kept"] > 0 for step in steps) <= len(steps) / 2:
        found.append("meta-experiences were kept in less than half of the steps")
    early, late = (_mean(part, "reward/correct") for part in (steps[: len(steps) // 2], steps[len(steps) // 2 :]))
    if not late > early:
        found.append(f"the share of right responses did not rise: {early:.3f}, then {late:.3f}")
    return found


def summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the steps after the first, which warms up."""
    steps = steps[1:] or steps
    names = [f"time/{phase}" for phase in (*PHASES, "step")]
    names += ["perf/train_tokens_per_s", "perf/sampled_tokens_per_s", "policy/rollout_gap", "mel/retention"]
    return {name: round(_mean(steps, name), 5) for name in names}


def _mean(steps: Sequence[dict[str, float]], name: str) -> float:
    values = [step[name] for step in steps if name in step]
    return sum(values) / len(values) if values else 0.0


def run(options: Sequence[str], folder: Path, seconds: float) -> tuple[list[dict[str, float]], str]:
    """The finished steps, and how the run ended."""
    process = subprocess.Popen([sys.executable, *MODULE, f"--run.folder={folder}", *options])
    try:
        status = process.wait(timeout=seconds)
        ending = "to the end" if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it closes its pool of verifiers
        ending = f"ended after {seconds:.0f} s"
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    file = folder / "latest" / "metrics.jsonl"
    lines: list[dict[str, Any]] = list(read_jsonl(file)) if file.exists() else []
    return [line for line in lines if "loss/total" in line], ending


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=300.0, help="the run is ended after this long")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/mel-run-<device>-<date>.json")
    options, overrides = parser.parse_known_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [*(ON_CUDA if kind == "cuda" else ()), *overrides]
    folder = Path("runs") / f"mel-run-{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"
    steps, ending = run(settings, folder, options.seconds)
    found = faults(steps, kind) + ([ending] if ending.startswith("exit") else [])
    report = {
        "benchmark": "mel run",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.mel_run", *sys.argv[1:]]),
        "settings": settings,
        "device": machine(torch.device(kind)),
        "ending": ending,
        "faults": found,
        "means": summary(steps) if steps else {},
        "steps": steps,
    }
    path = options.out or Path(__file__).parent / "results" / f"mel-run-{kind}-{report['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(steps)} steps, {ending}")
    for name, value in report["means"].items():
        print(f"  {name:<28} {value:,.4g}")
    print("\n".join(f"fault: {each}" for each in found) or "no fault found")
    print(f"written: {os.path.relpath(path)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
