"""Does Meta-Experience Learning help, and which form of it? A study in the embedded world, run by the trainer itself.

    python -m benchmarks.study                       # everything: hours of two cores; goes on where it was cut off
    python -m benchmarks.study --worlds plain --arms GRPO MEL right --seeds 1 2

For each arm (study_arms) the learning rate is chosen in worlds of its own, by the share of right rollouts in the last
steps (their prompts are fresh; a probability of fixed words would punish a policy that only says it differently). Then
each arm runs in every world of the study with five seeds (world, warm start and run), paired. Every run leaves a small
`result.json` below `--work`; what is there already is not run again. Writes the JSON file of results, the tables and
the plots (study_report), and the diagnosis of gradients (study_gradients).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shlex
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import study_gradients, study_report, study_trial
from benchmarks.loss_measure import machine
from benchmarks.study_arms import ARMS, RATES, SEEDS, STEPS, SWEEP_SEEDS, WORLDS, Trial

LAST = 5
"""Steps over whose rollouts a learning rate is judged."""
CLOSE = 0.025
"""Rates that differ by no more are compared in further worlds."""


class Study:
    """Args:
    work: where runs leave what they found.
    workers: processes, one thread each.
    """

    def __init__(self, work: Path, workers: int) -> None:
        self.work = work
        # No max_tasks_per_child: with it the pool of Python 3.11 may wait for ever once all workers were replaced.
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def warm_up(self, trials: Iterable[Trial]) -> dict[str, dict[str, float]]:
        """Builds the worlds; the probabilities of their warm-started policies, by `world/seed`."""
        worlds = {f"{trial.world}/{trial.seed}": trial for trial in trials}
        futures = {self.pool.submit(study_trial.warm_up, trial): name for name, trial in worlds.items()}
        found: dict[str, dict[str, float]] = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            print(f"world {futures[future]}: {found[futures[future]]['solution/trained']:.3f} before", flush=True)
        return found

    def run(self, trials: Sequence[Trial]) -> dict[Trial, dict[str, Any]]:
        """Raises what a trial raised; the others are finished first, so nothing is lost."""
        futures = {self.pool.submit(study_trial.run, trial, self.work): trial for trial in dict.fromkeys(trials)}
        found: dict[Trial, dict[str, Any]] = {}
        for number, future in enumerate(as_completed(futures), start=1):
            trial = futures[future]
            if future.exception() is None:
                found[trial] = future.result()
                print(f"[{number}/{len(futures)}] {trial.folder}: {_judge(found[trial]):.3f}", flush=True)
        for future in futures:
            future.result()
        return found

    def choose_rates(self, arms: Sequence[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The best learning rate of each arm in the sweep's worlds, and what was seen there. The other worlds decide
        between rates that are close in the first."""
        first, *others = SWEEP_SEEDS
        found = self.run([_sweep(arm, rate, first) for arm in arms for rate in RATES])
        # Where the highest is the best one, a higher one may be better still.
        edges = [arm for arm in arms if _best(found, arm)[0] == max(RATES)]
        found |= self.run([_sweep(arm, 2 * max(RATES), first) for arm in edges])
        close = [(arm, rate) for arm in arms for rate in _best(found, arm) if len(_best(found, arm)) > 1]
        found |= self.run([_sweep(arm, rate, seed) for arm, rate in close for seed in others])
        sweep = [asdict(trial) | {"correct": _judge(result)} for trial, result in found.items()]
        return {arm: _best(found, arm)[0] for arm in arms}, sweep


def _sweep(arm: str, rate: float, seed: int) -> Trial:
    return Trial("plain", arm, rate, seed, judged=False)


def _judge(result: dict[str, Any]) -> float:
    return sum(result["correct"][-LAST:]) / LAST


def _best(found: dict[Trial, dict[str, Any]], arm: str) -> list[float]:
    """The arm's rates within `CLOSE` of its best one, best first; of those tried in the most worlds."""
    scores: dict[float, list[float]] = {}
    for trial, result in found.items():
        if trial.arm == arm:
            scores.setdefault(trial.rate, []).append(_judge(result))
    worlds = max(map(len, scores.values()))
    means = {rate: sum(seen) / worlds for rate, seen in scores.items() if len(seen) == worlds}
    ranked = sorted(means, key=means.__getitem__, reverse=True)
    return [rate for rate in ranked if means[rate] >= means[ranked[0]] - CLOSE]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="where runs leave what they found")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/study-{today}.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(options.work, options.workers)
    chosen = [(world, arm) for world in options.worlds for arm in options.arms if world in ARMS[arm].worlds]
    judged = [Trial(world, arm, RATES[0], seed) for world, arm in chosen for seed in options.seeds]
    sweep = [_sweep(arm, RATES[0], seed) for arm in options.arms for seed in SWEEP_SEEDS]
    before = study.warm_up([*sweep, *judged])
    rates, seen = study.choose_rates(options.arms)
    print("rates: " + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()), flush=True)
    found = study.run([Trial(t.world, t.arm, rates[t.arm], t.seed) for t in judged])
    report = {
        "benchmark": "study",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command(options),
        "device": machine(torch.device("cpu")),
        "steps": STEPS,
        "before": before,
        "rates": rates,
        "sweep": seen,
        "trials": [asdict(trial) | result for trial, result in found.items()],
        "gradients": gradients(study, options.seeds) if "plain" in options.worlds else [],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    study_report.write(options.out)


def command(options: argparse.Namespace) -> str:
    """What gives the same figures again, on another machine, too."""
    chosen = {"worlds": list(WORLDS), "arms": list(ARMS), "seeds": list(SEEDS)}
    given = {name: getattr(options, name) for name, every in chosen.items() if getattr(options, name) != every}
    return shlex.join(
        ["python", "-m", "benchmarks.study", *(f for n, v in given.items() for f in (f"--{n}", *map(str, v)))]
    )


def gradients(study: Study, seeds: Sequence[int]) -> list[dict[str, Any]]:
    futures = [study.pool.submit(study_gradients.measure, seed, study.work) for seed in seeds]
    return [row for future in futures for row in future.result()]


if __name__ == "__main__":
    main()
