"""Does the verifier stand up to what a model may write, and what do attacks cost the other answers?

    python -m benchmarks.verifier_fuzz

Three parts, all reproducible from the seed (verifier_cases):

- fuzz: right, wrong, hedged, damaged and hostile outputs through one pool. No hang, no crash of the trainer, every
  score as it must be, code in answers not run.
- throughput: ordinary answers per second with 1 and 2 workers until the last of them is there, with and without attacks
  among them, and how long one waits. Only answers that need a worker are counted, each of them once: plain integers
  take microseconds, and verdicts are remembered.
- threads: the same verdicts from a thread that is not the main one, where timers based on signals do not work.

Exit status 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_measure import load_average, machine
from benchmarks.verifier_cases import Case, attacks, corpus, curated
from mel_fast import answers
from mel_fast.types import Prompt
from mel_fast.verify import Verdict, Verifier, VerifyConfig

PROMPT = Prompt(id="fuzz", question="", answer="")
GROUP = 1024  # responses that are scored at once: 128 prompts of 8


def score_all(verifier: Verifier, cases: Sequence[Case], at_once: int = GROUP) -> list[tuple[Verdict, float]]:
    """Each verdict, and the seconds it took to come."""

    async def one(case: Case) -> tuple[Verdict, float]:
        began = time.perf_counter()
        return await verifier.score(case.response, case.gold, PROMPT), time.perf_counter() - began

    async def all_of(group: Sequence[Case]) -> list[tuple[Verdict, float]]:
        return await asyncio.gather(*map(one, group))

    found: list[tuple[Verdict, float]] = []
    for start in range(0, len(cases), at_once):
        found += asyncio.run(all_of(cases[start : start + at_once]))
    return found


def faults(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> list[str]:
    """What is not as it must be."""
    found: list[str] = []
    for case, verdict in zip(cases, verdicts, strict=True):
        undecided = verdict.reason in ("timeout", "crash")
        if (case.score is not None and verdict.score != case.score) or verdict.score not in (0.0, 1.0):
            found.append(f"{case.kind} {case.response[:100]!r}, gold {case.gold!r}: {verdict}")
        elif undecided and case.kind in ("right", "wrong", "hedged"):
            found.append(f"{case.kind} {case.response[:100]!r} was not decided: {verdict.reason}")
    return found


def fuzz(count: int, seed: int, hostile: float, workers: int, timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        canary = Path(scratch) / "ran"
        cases = [*curated(), *corpus(count, seed, hostile, str(canary))]
        with Verifier(VerifyConfig(workers=workers, timeout_s=timeout_s)) as verifier:
            began = time.perf_counter()
            found = score_all(verifier, cases)
            wall = time.perf_counter() - began
        wrong = faults(cases, [verdict for verdict, _ in found])
        if canary.exists():
            wrong.append("code in an answer was run")
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    named: dict[str, Counter[str]] = defaultdict(Counter)
    for case, (verdict, _) in zip(cases, found, strict=True):
        outcome = verdict.reason or ("right" if verdict.correct else "wrong")
        outcomes[case.kind][outcome] += 1
        if case.kind == "hostile":
            named[case.name][outcome] += 1
    return {
        "outputs": len(cases),
        "curated": len(curated()),
        "workers": workers,
        "timeout_s": timeout_s,
        "wall_s": round(wall, 1),
        "faults": wrong,
        "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
        "attacks": {name: dict(named[name]) for name in attacks("") if name in named},
        "load": load_average(),
    }


def throughput(count: int, seed: int, hostile: float, workers: int, timeout_s: float) -> dict[str, Any]:
    """`count` ordinary answers that need a worker, all different, with attacks scattered among them."""
    drawn = (case for case in corpus(40 * count, seed, 0.0, "") if case.kind in ("right", "wrong"))
    ordinary = list({found: case for case in drawn if (found := _compared(case))}.values())[: count + workers]
    first, ordinary = ordinary[:workers], ordinary[workers:]
    bad = list(corpus(round(count * hostile), seed, 1.0, ""))
    every = max(1, len(ordinary) // len(bad)) if bad else 0
    cases = list(ordinary)
    for number, attack in enumerate(bad):
        cases.insert(number * (every + 1), attack)
    with Verifier(VerifyConfig(workers=workers, timeout_s=timeout_s)) as verifier:
        score_all(verifier, first)  # the workers have started
        began = time.perf_counter()
        found = score_all(verifier, cases, at_once=len(cases))
        wall = time.perf_counter() - began
    waits = [wait for case, (_, wait) in zip(cases, found, strict=True) if case.kind != "hostile"]
    undecided = Counter(verdict.reason for verdict, _ in found if verdict.reason in ("timeout", "crash"))
    return {
        "workers": workers,
        "hostile": hostile,
        "timeout_s": timeout_s,
        "ordinary": len(ordinary),
        "attacks": len(bad),
        "undecided": dict(undecided),
        "faults": faults(cases, [verdict for verdict, _ in found]),
        "ordinary_per_s": round(len(ordinary) / max(waits), 1),
        "wait_median_s": round(statistics.median(waits), 3),
        "ordinary_s": round(max(waits), 2),
        "all_s": round(wall, 2),
        "load": load_average(),
    }


def _compared(case: Case) -> tuple[str, str] | None:
    """What the workers are given of it, if they are needed."""
    found, reason = answers.stated(case.response, VerifyConfig().max_chars)
    return None if reason or answers.same_integer(found, case.gold) is not None else (found, case.gold)


def off_the_main_thread(count: int, seed: int) -> dict[str, Any]:
    """The same cases from the main thread, and from four others that share the verifier."""
    cases = list(corpus(count, seed, 0.005, ""))
    with Verifier(VerifyConfig(workers=2, timeout_s=2.0)) as verifier, ThreadPoolExecutor(4) as threads:
        here = [verdict for verdict, _ in score_all(verifier, cases)]
        quarters = [cases[start::4] for start in range(4)]
        there = [[v for v, _ in found] for found in threads.map(lambda part: score_all(verifier, part), quarters)]
    differ = [
        f"{case.kind} {case.response[:100]!r}: {one} in the main thread, {other} in another"
        for start in range(4)
        for case, one, other in zip(quarters[start], here[start::4], there[start], strict=True)
        if one.score != other.score
    ]
    return {"outputs": len(cases), "faults": faults(cases, here) + differ, "load": load_average()}


def run(count: int, seed: int, command: str) -> dict[str, Any]:
    device = machine(torch.device("cpu"))
    versions: Any = device["versions"]
    for package in ("math-verify", "sympy", "pebble", "latex2sympy2_extended"):
        versions[package] = importlib.metadata.version(package)
    report: dict[str, Any] = {
        "benchmark": "verifier_fuzz",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "device": device,
        "seed": seed,
        "fuzz": fuzz(count, seed, 0.02, workers=2, timeout_s=2.0),
    }
    print(_told("fuzz", report["fuzz"]), flush=True)
    report["throughput"] = []
    for workers in (1, 2):
        for hostile in (0.0, 0.01, 0.05):
            found = throughput(count // 10, seed + 1, hostile, workers, timeout_s=2.0)
            report["throughput"].append(found)
            print(_told("throughput", found), flush=True)
    report["threads"] = off_the_main_thread(count // 20, seed + 2)
    print(_told("threads", report["threads"]), flush=True)
    return report


def _told(part: str, found: dict[str, Any]) -> str:
    plain = ", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, list | dict))
    return f"{part}: {plain}, faults {len(found['faults'])}" + "".join(f"\n  {fault}" for fault in found["faults"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/verifier-fuzz-cpu-<date>.json")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC).date()
    path = options.out or Path(__file__).parent / "results" / f"verifier-fuzz-cpu-{today}.json"
    report = run(options.outputs, options.seed, shlex.join(["python", "-m", "benchmarks.verifier_fuzz", *sys.argv[1:]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    parts = [report["fuzz"], *report["throughput"], report["threads"]]
    return int(any(part["faults"] for part in parts))


if __name__ == "__main__":
    sys.exit(main())
