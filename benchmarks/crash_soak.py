"""Does a run that is killed again and again come back by itself, and end as if nothing had happened?

    nice python -m benchmarks.crash_soak                        # about a quarter of an hour on two cores
    nice python -m benchmarks.crash_soak --matrix --kills 1 --ranks 2   # every point in turn
    nice python -m benchmarks.crash_soak --engine sglang --mode async --matrix --kills 1 --ranks 1

Small runs in the embedded world on one and two ranks, by `torchrun --max-restarts`. In each attempt one rank ends
itself by SIGKILL: at a random time, or within a random function (crash_trial.POINTS), so that files are left half
written. A run passes if, but for times, its metrics, rollouts, evaluations, data cursor and final weights are those
of the run without faults, bit for bit, and if it leaves no process, no unfinished file and no second directory.
Rollout servers do not draw the same samples twice: with them the prompts of each step and the number of samples of
each prompt must be the same, the steps in the metrics, the names of all files and the cursor; no sample may be older
than the mode allows, no server lost, and no server or copy of the weights left behind.
`back`: seconds from the kill until the restarted ranks collect rollouts again; most of it are imports.

The exit status is 1 when a run differs. Everything follows from the seed but for what random times hit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.crash_trial import Fault, matrix, plan
from benchmarks.loss_measure import load_average, machine
from mel_fast.dumps import read_jsonl

SETTINGS = (
    "--run.steps=6",
    "--run.checkpoint_every=2",
    "--rollout.prompts_per_step=4",
    "--rollout.group_size=6",
    "--verify.workers=1",
    "--eval.every=3",
    "--eval.at_ends=false",
    "--eval.samples=1",
    "--eval.sets=[{path: '{tiny}/heldout.jsonl', limit: 8}]",
)
SERVERS = (
    "--rollout.engine=sglang",
    "--rollout.sglang.kv_tokens=16384",
    "--rollout.sglang.health_every_s=1",
    "--rollout.sglang.gate_min_tokens=1",  # prompts are short here
)
AHEAD = ("--rollout.mode=async", "--objective.tis_cap=2")
MARK = "MEL_FAST_CRASH_SOAK"  # in the environment of every process of a run


def run(folder: Path, ranks: int, faults: Sequence[Fault], static: bool, settings: Sequence[str]) -> dict[str, Any]:
    """Runs to the end, through all faults.

    Returns:
        `directory`, `status` of torchrun, its `output`, the `log` of the trial, and `processes` and `copies` of the
        weights that were left.
    """
    folder.mkdir(parents=True)
    plan_file, log = folder / "plan.json", folder / "log.jsonl"
    plan_file.write_text(json.dumps([asdict(fault) for fault in faults]))
    meeting = [f"--master-port={_free_port()}"] if static else ["--standalone"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={len(faults) + 1}", "-m", "benchmarks.crash_trial", str(plan_file), str(log)]
    copies = folder / "copies"
    command += [f"--run.folder={folder / 'runs'}", f"--rollout.sglang.weights_folder={copies}", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", MARK: str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    return {
        "directory": folder / "runs" / "latest",
        "status": done.returncode,
        "output": done.stdout + done.stderr,
        "log": read_jsonl(log) if log.exists() else [],
        "processes": _left(folder),
        "copies": sorted(map(str, copies.glob("*"))),
    }


def differences(reference: Path, other: Path, exact: bool = True) -> list[str]:
    """What tells two run directories apart, in words; nothing when all that must repeat does.

    Args:
        exact: all figures and tokens must repeat; they do not with rollout servers.
    """
    found: list[str] = []
    one, two = (_lines(path / "metrics.jsonl") for path in (reference, other))
    if [line["step"] for line in one] != [line["step"] for line in two]:
        found.append(f"metrics: lines of steps {[line['step'] for line in two]}")
    for expected, line in zip(one, two, strict=False) if exact else ():
        if keys := sorted(k for k in expected.keys() | line.keys() if expected.get(k) != line.get(k)):
            found.append(f"metrics of step {line['step']}: {', '.join(keys[:3])} ({len(keys)} in all)")
    for pattern in ("rollouts/*", "evaluations/*", "model/*.safetensors"):
        expected, names = ({p.relative_to(r) for p in r.glob(pattern)} for r in (reference, other))
        if expected != names:
            found.append(f"{pattern}: {sorted(map(str, expected ^ names))} only in one of them")
        both = sorted(expected & names)
        if exact:
            found += [str(name) for name in both if (reference / name).read_bytes() != (other / name).read_bytes()]
    if _prompts(reference) != _prompts(other):
        found.append("prompts were lost, repeated or drawn in another order")
    if _cursor(reference) != _cursor(other):
        found.append("the data cursor")
    found += [f"left behind: {path}" for path in other.rglob(".writing_*")]
    found += [f"left behind: {path}" for path in other.rglob("*.partial")]
    return found


def amiss(directory: Path, oldest: int) -> list[str]:
    """What must not be in the metrics of any run: samples more than so many updates old, a server that was lost."""
    found: list[str] = []
    for line in read_jsonl(directory / "metrics.jsonl"):
        if (age := line.get("rollout/staleness_max", 0)) > oldest:
            found.append(f"step {line['step']}: samples {age:.0f} updates old")
        if line.get("engine/lost"):
            found.append(f"step {line['step']}: a server was lost")
    return found


def _lines(path: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "perf/"))}
        for line in read_jsonl(path)
    ]


def _prompts(path: Path) -> list[list[tuple[str, int]]]:
    """By step, in order, each with the number of its samples."""
    files = sorted((path / "rollouts").glob("step_*.jsonl"))
    return [[(row["prompt"]["id"], len(row["trajectories"])) for row in read_jsonl(p)] for p in files]


def _cursor(path: Path) -> Any:
    newest = max((path / "checkpoints").glob("step_*"))
    return json.loads((newest / "state.json").read_text())["cursor"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _left(folder: Path) -> int:
    """Processes of a run that are still there, two seconds after its end."""
    deadline = time.monotonic() + 2
    while (count := _marked(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return count


def _marked(folder: Path) -> int:
    """By the mark, or by a log in the folder: processes of a server overwrite their environment with their title."""
    wanted, count = f"{MARK}={folder}".encode(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            marked = wanted in (process / "environ").read_bytes().split(b"\0")
            count += marked or (process / "fd/1").readlink().is_relative_to(folder)
        except OSError:
            continue  # it has ended, or is somebody else's
    return count


def struck(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faults of a run, each with `back`: seconds until ranks collected again, None where that was not needed."""
    faults = [line for line in log if line["event"] in ("kill", "hang")]
    for fault in faults:
        later = [line["time"] for line in log if line["event"] == "collect" and line["attempt"] == fault["attempt"] + 1]
        fault["back"] = round(later[0] - fault["time"], 2) if later else None
    return faults


def table(faults: Sequence[dict[str, Any]], by: str) -> str:
    """Markdown: how often each phase or point was hit, and the time to be back."""
    rows = [f"| {by} | rank 0 | another rank | back, s: median | longest |", "|---|---:|---:|---:|---:|"]
    for name in sorted({fault[by] for fault in faults}):
        hit = [fault for fault in faults if fault[by] == name]
        back = [fault["back"] for fault in hit if fault["back"] is not None]
        times = f"{statistics.median(back):.1f} | {max(back):.1f}" if back else "- | -"
        first = sum(fault["rank"] == 0 for fault in hit)
        rows.append(f"| {name} | {first} | {len(hit) - first} | {times} |")
    return "\n".join(rows)


def soak(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs until there were enough kills, or the time is up."""
    deadline, reference = time.monotonic() + 60 * options.minutes, dict[int, Path]()
    engine, settings = options.engine, settings_of(options)
    seconds = options.seconds or (6.0 if engine == "local" else 45.0)
    runs: list[dict[str, Any]] = []
    while sum(len(r["faults"]) for r in runs) < options.kills and time.monotonic() < deadline:
        number, ranks = len(runs), options.ranks[len(runs) % len(options.ranks)]
        if ranks not in reference:
            whole = run(scratch / f"reference-{ranks}", ranks, [], False, settings)
            if whole["status"] != 0:
                raise SystemExit(f"the run without faults failed:\n{whole['output'][-3000:]}")
            reference[ranks] = whole["directory"]
        draw = random.Random(f"{options.seed}/{number}")
        static = number % 3 == 2  # torchrun's plain rendezvous, which is the default, and else --standalone's
        faults = matrix(ranks, engine) if options.matrix else plan(draw, ranks, options.faults, seconds, engine)
        one = run(scratch / f"run-{number}", ranks, faults, static, settings)
        found = [one["output"][-3000:]]
        if one["status"] == 0:
            found = differences(reference[ranks], one["directory"], exact=engine == "local")
            found += amiss(one["directory"], oldest=int(options.mode == "async"))
        found += [f"left behind: {path}" for path in one["copies"]]
        if one["processes"]:
            found.append(f"{one['processes']} processes left")
        if extra := len([p for p in one["directory"].parent.iterdir() if p.name != "latest"]) - 1:
            found.append(f"{extra} more run directories")
        hit = [fault | {"ranks": ranks, "run": number} for fault in struck(one["log"])]
        runs.append({"ranks": ranks, "static": static, "faults": hit, "differences": found})
        print(f"run {number}: {ranks} ranks, {len(hit)} kills, {'; '.join(found) or 'the same'}", flush=True)
    return {"runs": runs, "faults": [fault for each in runs for fault in each["faults"]]}


def settings_of(options: argparse.Namespace) -> tuple[str, ...]:
    if options.engine == "local":
        return SETTINGS
    return SETTINGS + SERVERS + (AHEAD if options.mode == "async" else ())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=54, help="no new run is begun after so many")
    parser.add_argument("--faults", type=int, default=6, help="planned for each run")
    parser.add_argument("--engine", choices=("local", "sglang"), default="local")
    parser.add_argument("--mode", choices=("sync", "async"), default="sync", help="sglang: rollout.mode")
    parser.add_argument("--seconds", type=float, help="random times lie within, after the imports; 6, with servers 45")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="runs take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix", action="store_true", help="every point in turn, in one run, instead of random ones")
    parser.add_argument("--minutes", type=float, default=45.0, help="no new run is begun after so long")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/crash-soak-cpu-<date>.json and .md")
    options = parser.parse_args()
    before, began = load_average(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(options, Path(scratch))
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {
        "benchmark": "crash soak",
        "date": date,
        "command": shlex.join(["python", "-m", "benchmarks.crash_soak", *sys.argv[1:]]),
        "settings": settings_of(options),
        "device": machine(torch.device("cpu")),
        "load": [before, load_average()],
        "minutes": round((time.monotonic() - began) / 60, 1),
        "divergent": sum(bool(each["differences"]) for each in found["runs"]),
    } | found
    path = options.out or Path(__file__).parent / "results" / f"crash-soak-cpu-{date}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    text = [
        f"{len(found['faults'])} kills in {len(found['runs'])} runs; {report['divergent']} runs differ from those "
        f"without faults. {date}, {report['minutes']} minutes, `{report['command']}`, torch {torch.__version__}, load "
        f"average {before} to {report['load'][1]}.",
        *(table(found["faults"], by) for by in ("phase", "point")),
    ]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))
    return 1 if report["divergent"] else 0


if __name__ == "__main__":
    sys.exit(main())
