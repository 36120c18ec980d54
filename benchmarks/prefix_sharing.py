"""How much of what reflections have in common do the servers compute only once, and what does that cost?

    python -m benchmarks.prefix_sharing                      # all scenarios: half an hour on two cores
    python -m benchmarks.prefix_sharing --only "at once" --repeats 1
    python -m benchmarks.prefix_sharing --resume                     # what is not in the file yet

Real SGLang servers on the CPU with a tiny model and an imposed minimum time of each forward pass (timed_servers), the
reflections of a step as prompts (prefix_workload), sent through the trainer's own engine in several ways
(prefix_trial). Needs the servers' environment (`make sglang`). Writes a JSON file, and from it a table and a plot
(prefix_report).

Figures. `share`: prompt tokens that the servers had cached, over those that perfect caches would have had, where each
server's cache begins empty and again at its restart. `of one tree`: over what a single cache for all would have had.
`wall`: from the first arrival to the last answer.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss_measure import load_average, machine
from benchmarks.prefix_report import write
from benchmarks.prefix_trial import Arm, Scenario, measure
from benchmarks.prefix_workload import describe, make_queries, make_rollouts
from benchmarks.timed_servers import TimedServer, Times, attach, engine_for, late_share, running, save_model, server
from mel_fast.rollout.sglang.engine import SGLangEngine

NAIVE = Arm("naive")
SCATTERED = Arm("naive, servers in turn", scattered=True)
LPM = Arm("lpm", lpm=True)
DEPTH_FIRST = Arm("depth-first, 16 in flight", in_flight=16)
GATE = Arm("gate", gate=True, window=True)
BARE_GATE = Arm("gate without window", gate=True)
ARMS = (NAIVE, LPM, DEPTH_FIRST, GATE)
SCENARIOS = (
    Scenario("at once", ARMS),
    Scenario("staggered under rollouts", ARMS, arrival_s=15.0, rollouts=32),
    Scenario("two servers", (SCATTERED, NAIVE, GATE), servers=2),
    Scenario("two servers, staggered under rollouts", (SCATTERED, NAIVE, GATE), servers=2, arrival_s=15.0, rollouts=32),
    Scenario("small pool", (NAIVE, BARE_GATE, GATE), small_pool=True),
    Scenario("small pool, staggered under rollouts", (NAIVE, GATE), small_pool=True, arrival_s=15.0, rollouts=8),
    Scenario("leaders fail", (NAIVE, GATE), faults=True),
    Scenario("the server restarts", (NAIVE, GATE), kill_at_s=3.0),
    Scenario("one of two servers restarts", (NAIVE, GATE), servers=2, arrival_s=15.0, kill_at_s=5.0),
)
POOL, SMALL_POOL = 262_144, 40_000  # tokens
NEW_TOKENS, ROLLOUT_TOKENS = 32, 600


class Site:
    """The servers of all scenarios but those that restart; they are started together, once."""

    def __init__(self, folder: Path, model: Path, scenarios: Sequence[Scenario]) -> None:
        self.folder, self.model = folder, model
        needed = [s for s in scenarios if s.kill_at_s is None]
        count = max((s.servers for s in needed if not s.small_pool), default=0)
        self.plain = [server(folder, model, f"plain-{index}", POOL) for index in range(count)]
        lpm = any(arm.lpm for s in needed for arm in s.arms)
        self.lpm = [server(folder, model, "lpm", POOL, ("--schedule-policy", "lpm"))] if lpm else []
        self.small = [server(folder, model, "small", SMALL_POOL)] if any(s.small_pool for s in needed) else []

    @contextmanager
    def engine(self, scenario: Scenario, arm: Arm) -> Iterator[tuple[SGLangEngine, Sequence[TimedServer]]]:
        if scenario.kill_at_s is not None:
            names = [f"killed-{time.monotonic_ns()}-{index}" for index in range(scenario.servers)]
            servers = [server(self.folder, self.model, name, POOL) for name in names]
            config = servers[0].config.model_copy(update={"prefix_gate": arm.gate, "health_every_s": 1.0})
            engine = engine_for(config, servers, str(self.model), self.folder)
        else:
            servers = self.lpm if arm.lpm else self.small if scenario.small_pool else self.plain[: scenario.servers]
            engine = attach(servers, self.folder, prefix_gate=arm.gate)
        with engine:
            yield engine, servers


def run(scenarios: Sequence[Scenario], repeats: int, queries: int, command: str, path: Path, resume: bool) -> None:
    """All of them; the file is complete after each.

    Args:
        resume: keep the scenarios that the file has.
    """
    torch.set_num_threads(1)
    work, rollouts = make_queries(queries, NEW_TOKENS), make_rollouts(32, ROLLOUT_TOKENS)
    report: dict[str, Any] = {
        "benchmark": "prefix sharing",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "device": machine(torch.device("cpu")),
        "sglang": "0.5.23",
        "times": Times().describe(),
        "workload": describe(work),
        "new_tokens": NEW_TOKENS,
        "pool_tokens": {"small": SMALL_POOL, "other": POOL},
        "scenarios": [],
    }
    if resume and path.exists():
        before = json.loads(path.read_text())
        if before["workload"] != report["workload"]:
            raise SystemExit(f"{path}: its workload is another one")
        report |= {"scenarios": before["scenarios"], "command": f"{before['command']}, then {command}"}
        done = {found["name"] for found in before["scenarios"]}
        scenarios = [scenario for scenario in scenarios if scenario.name not in done]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        site = Site(folder, save_model(folder), scenarios)
        with running([*site.plain, *site.lpm, *site.small]):
            for scenario in scenarios:
                rounds = 1 if scenario.kill_at_s is not None else repeats  # a restart takes a minute
                runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in scenario.arms}
                for _ in range(rounds):
                    for arm in scenario.arms:
                        with site.engine(scenario, arm) as (engine, servers):
                            since = time.monotonic()
                            found = measure(engine, scenario, arm, work, rollouts)
                            found |= {"late_share": round(late_share(servers, since), 4), "load": load_average()}
                        runs[arm.name].append(found)
                        share, wall = found["share"], found["wall_s"]
                        print(f"{scenario.name}, {arm.name}: {share:.2%}, {wall:.2f} s, {found['engine']}", flush=True)
                report["scenarios"].append(
                    {"name": scenario.name, "arms": [_summary(name, found) for name, found in runs.items()]}
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=1) + "\n")


def _summary(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = ("share", "share_of_one_tree", "wall_s", "latency_mean_s")
    return {"name": name, **{key: statistics.median(run[key] for run in runs) for key in keys}, "runs": list(runs)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="scenarios whose name contains this; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="of each arm, in turn; restarts are run once")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/prefix-sharing-cpu-<date>.json")
    parser.add_argument("--resume", action="store_true", help="keep the scenarios that the file has, add the others")
    options = parser.parse_args()
    scenarios = [s for s in SCENARIOS if not options.only or any(text in s.name for text in options.only)]
    if not scenarios:
        parser.error(f"no such scenario; there are: {', '.join(s.name for s in SCENARIOS)}")
    today = datetime.datetime.now(datetime.UTC).date()
    path = options.out or Path(__file__).parent / "results" / f"prefix-sharing-cpu-{today}.json"
    command = shlex.join(["python", "-m", "benchmarks.prefix_sharing", *sys.argv[1:]])
    run(scenarios, options.repeats, options.queries, command, path, options.resume)
    print("written: " + ", ".join(map(str, [path, *write(path)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
