"""Does anything grow over thousands of steps?

    nice python -m benchmarks.long_run                    # 2,000 tiny steps
    python -m benchmarks.long_run --steps 40 --run.checkpoint_every=10   # in miniature; settings as for a run

Runs `mel_fast.train` in the embedded world with steps as small as they can be, and looks at it from outside, every few
seconds: resident memory, open files and threads of the process, its children, and its metrics file, which is read
as a whole while it is being written. Then the report is built. Figures are taken after the first fifth of the run;
slopes are least squares per 1000 steps. Wall times depend on what else the machine does, so the processor time of the
process per step is given beside them. The exit status is 1 when something grows beyond LIMITS.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loss_measure import load_average, machine
from mel_fast.dumps import read_jsonl

SETTINGS = (
    "--rollout.prompts_per_step=2",
    "--rollout.group_size=4",
    "--rollout.max_new_tokens=24",
    "--verify.workers=1",
    "--run.checkpoint_every=100",
    "--eval.every=0",
    "--eval.at_ends=false",
)
LIMITS = {"rss_mb": 20.0, "files": 2.0, "threads": 2.0, "children": 2.0, "cpu_ms": 20.0}  # growth per 1000 steps
TICKS = os.sysconf("SC_CLK_TCK")


def look(pid: int) -> dict[str, float]:
    """What the process holds at this moment, and the processor time it has used."""
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    if "VmRSS" not in status:
        raise ProcessLookupError(f"process {pid} has ended")
    after_name = (process / "stat").read_text().rpartition(")")[2].split()
    children = (process / "task" / str(pid) / "children").read_text().split()
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "children": len(children),
        "cpu_s": (int(after_name[11]) + int(after_name[12])) / TICKS,
    }


def watch(process: subprocess.Popen[bytes], metrics: Path, every: float, minutes: float) -> list[dict[str, float]]:
    """Looks at a run until it ends; ends it after so many minutes.

    Raises:
        InputError: the metrics file could not be read, or a line of it was not JSON.
    """
    seen: list[dict[str, float]] = []
    deadline = time.monotonic() + 60 * minutes
    while process.poll() is None:
        time.sleep(every)
        if not metrics.exists():
            continue
        began = time.perf_counter()
        lines = read_jsonl(metrics)
        reading = time.perf_counter() - began
        try:
            held = look(process.pid)
        except (FileNotFoundError, ProcessLookupError):
            break  # it ended just now
        if lines:
            seen.append({"step": lines[-1]["step"], "read_s": reading} | held)
        if time.monotonic() > deadline:
            process.terminate()  # not SIGINT, which what is started in the background ignores
            break
    return seen


def growth(points: Sequence[tuple[float, float]]) -> float:
    """Slope of (step, value) per 1000 steps, by least squares."""
    steps, values = np.array(points, dtype=np.float64).T
    return float(np.polyfit(steps - steps.mean(), values, 1)[0]) * 1000


def summary(seen: Sequence[dict[str, float]], steps: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Figures over the last four fifths of a run.

    Args:
        seen: by `watch`.
        steps: the run's metrics.
    """
    first = steps[-1]["step"] / 5
    late = [s for s in seen if s["step"] > first]
    rates = [
        (b["step"], 1000 * (b["cpu_s"] - a["cpu_s"]) / (b["step"] - a["step"]))
        for a, b in itertools.pairwise(late)
        if b["step"] > a["step"]
    ]
    found: dict[str, Any] = {"looks": len(late), "cpu_ms": _figures(rates)}
    for name in ("rss_mb", "files", "threads", "children"):
        found[name] = _figures([(s["step"], s[name]) for s in late])
    found["step_ms"] = _figures([(s["step"], 1000 * s["time/step"]) for s in steps if s["step"] > first])
    found["read_ms"] = round(1000 * max(s["read_s"] for s in late), 1)
    return found


def _figures(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    tenth = max(1, len(points) // 10)
    values = [value for _, value in points]
    return {
        "begin": round(statistics.median(values[:tenth]), 2),
        "end": round(statistics.median(values[-tenth:]), 2),
        "highest": round(max(values), 2),
        "per_1000_steps": round(growth(points), 3),
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What grows, in words."""
    return [
        f"{name} grows by {found[name]['per_1000_steps']:g} per 1000 steps, more than {limit:g}"
        for name, limit in LIMITS.items()
        if found[name]["per_1000_steps"] > limit
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=120.0, help="the run is ended after so long, and judged")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between looks")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/long-run-cpu-<date>.json")
    options, overrides = parser.parse_known_args()
    before, began = load_average(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mel_fast.train", f"--run.folder={scratch}", f"--run.steps={options.steps}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        log = Path(scratch) / "console.txt"
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *SETTINGS, *overrides], stdout=output, stderr=output, env=environment)
            seen = watch(process, Path(scratch) / "latest" / "metrics.jsonl", options.every, options.minutes)
        status, minutes = process.wait(), (time.monotonic() - began) / 60
        if status != 0 and minutes < options.minutes:
            raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")
        directory = (Path(scratch) / "latest").resolve()
        steps = [line for line in read_jsonl(directory / "metrics.jsonl") if "time/step" in line]
        assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
        ended = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mel_fast.report", str(directory)], check=True, stdout=subprocess.DEVNULL)
        report_s = time.perf_counter() - ended
        sizes = {
            name: round((directory / name).stat().st_size / 1e6, 2) for name in ("report.html", "metrics.jsonl")
        } | {"rollouts": round(sum(p.stat().st_size for p in (directory / "rollouts").iterdir()) / 1e6, 2)}
    found = summary(seen, steps)
    report = {
        "benchmark": "long run",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.long_run", *sys.argv[1:]]),
        "settings": [*SETTINGS, *overrides],
        "device": machine(torch.device("cpu")),
        "load": [before, load_average()],
        "minutes": round(minutes, 1),
        "steps": len(steps),
        "updates": sum(line["optim/grad_norm"] > 0 for line in steps),
        "report_s": round(report_s, 1),
        "sizes_mb": sizes,
        "faults": faults(found),
        "summary": found,
        "seen": seen,
    }
    path = options.out or Path(__file__).parent / "results" / f"long-run-cpu-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(steps)} steps in {minutes:.1f} minutes, load average {before} to {report['load'][1]}")
    for name, figures in found.items():
        print(f"  {name:<10} {figures}")
    print(f"  report: {report_s:.1f} s; sizes in MB: {sizes}")
    print("\n".join(f"fault: {each}" for each in report["faults"]) or "nothing grows")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
