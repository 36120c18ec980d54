"""What do reflection and replay cost when they overlap with the rollouts, and what with barriers between the phases?

    python -m benchmarks.overlap

One step's sampling through a real SGLang server on the CPU with a tiny model and an imposed minimum time of each
forward pass (timed_servers), in three ways (overlap_trial): rollouts only, phase by phase, and as the trainer does it.
Needs the servers' environment (`make sglang`). Writes a JSON file, and from it a table and a picture (overlap_report).

Figures. `cost`: wall time beyond that of rollouts only, medians over the rounds. `requests`: in a forward pass, mean
over the time of the run. `busy`: share of the time with a forward pass under way.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_measure import load_average, machine
from benchmarks.overlap_report import write
from benchmarks.overlap_trial import Lengths, check, occupancy, step
from benchmarks.timed_servers import TimedServer, Times, attach, late_share, running, save_model, server
from mel_fast.metrics import cache_metrics

SCHEDULES = ("rollouts only", "phase by phase", "overlapped")


def run(prompts: int, group_size: int, repeats: int, lengths: Lengths, command: str) -> dict[str, Any]:
    """All schedules in turn, as often as asked."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "benchmark": "overlap",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "device": machine(torch.device("cpu")),
        "sglang": "0.5.23",
        "times": Times().describe(),
        "prompts": prompts,
        "group_size": group_size,
        "lengths": {"median": lengths.median, "sigma": lengths.sigma, "longest": lengths.longest},
        "schedules": [],
    }
    runs: dict[str, list[dict[str, Any]]] = {schedule: [] for schedule in SCHEDULES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        served = server(folder, save_model(folder), "server", kv_tokens=262_144)
        with running([served]):
            for _ in range(repeats):
                for schedule in SCHEDULES:
                    found = _run_once(served, folder, schedule, prompts, group_size, lengths)
                    print(f"{schedule}: {found['wall_s']:.2f} s, busy {found['busy_share']:.0%}", flush=True)
                    runs[schedule].append(found)
    for schedule, found in runs.items():
        wall = statistics.median(run["wall_s"] for run in found)
        report["schedules"].append({"name": schedule, "wall_s": wall, "runs": found})
    alone, phased, overlapped = (schedule["wall_s"] for schedule in report["schedules"])
    report["cost_s"] = {"phase by phase": phased - alone, "overlapped": overlapped - alone}
    report["cost_ratio"] = (overlapped - alone) / (phased - alone)
    return report


def _run_once(
    served: TimedServer, folder: Path, schedule: str, prompts: int, group_size: int, lengths: Lengths
) -> dict[str, Any]:
    with attach([served], folder) as engine:
        episodes, diary, begin = step(engine, schedule, prompts, group_size, lengths)
    end = max(asked.end for asked in diary)
    return {
        "wall_s": round(end - begin, 3),
        "tokens": check(episodes, schedule, prompts, group_size),
        **{name: round(value, 4) for name, value in occupancy(served.forwards(begin), begin, end).items()},
        "reached_share": round(cache_metrics(episodes)["cache/reached_share"], 4),
        "late_share": round(late_share([served], begin), 4),
        "load": load_average(),
        "requests": [[a.phase, round(a.start - begin, 3), round(a.end - begin, 3)] for a in diary],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of each schedule, in turn")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/overlap-cpu-<date>.json")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC).date()
    path = options.out or Path(__file__).parent / "results" / f"overlap-cpu-{today}.json"
    command = shlex.join(["python", "-m", "benchmarks.overlap", *sys.argv[1:]])
    began = time.monotonic()
    report = run(options.prompts, options.group_size, options.repeats, Lengths(), command)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report) + "\n")
    print("written: " + ", ".join(map(str, [path, *write(path)])) + f", in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
