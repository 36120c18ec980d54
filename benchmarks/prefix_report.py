"""Table and plot of a result file of the prefix-sharing benchmark.

    python -m benchmarks.prefix_report benchmarks/results/prefix-sharing-cpu-2026-11-25.json

Writes FILE.md and FILE.svg beside the JSON file, from what is in it and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"naive": "#b8b8b8", "lpm": "#7a7a7a", "depth": "#c46a1b", "gate": "#1b7f5c"}


def heading(report: dict[str, Any]) -> str:
    """What was measured, where and how."""
    device, work, runs = report["device"], report["workload"], _runs(report)
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items() if version)
    loads = [run["load"] for run in runs]
    late = max(run["late_share"] for run in runs)
    pool = report["pool_tokens"]
    return (
        f"{report['date']}, {device['name']}, load average {min(loads):.1f} to {max(loads):.1f} on a shared machine "
        f"of 2 cores. {versions}, SGLang {report['sglang']}. `{report['command']}`.\n\n"
        f"Imposed time of a forward pass: {report['times']}; passes took up to {late:.0%} of a run longer than that. "
        f"{work['queries']} queries, {work['prompts']} prompts, {work['tokens']:,} tokens, of which "
        f"{work['distinct_tokens']:,} distinct and {work['shareable_tokens']:,} shareable; about "
        f"{report['new_tokens']} new tokens each. KV pool: {pool['other']:,} tokens, the small one {pool['small']:,}."
    )


def markdown_table(report: dict[str, Any]) -> str:
    parts = [
        "| scenario | sent | share of optimum | lowest run | of one tree | wall, s | of each run | mean latency, s |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for scenario in report["scenarios"]:
        for arm in scenario["arms"]:
            runs = arm["runs"]
            cells = [
                scenario["name"],
                arm["name"],
                f"{arm['share']:.1%}",
                f"{min(run['share'] for run in runs):.2%}",
                f"{arm['share_of_one_tree']:.1%}",
                f"{arm['wall_s']:.1f}",
                ", ".join(f"{run['wall_s']:.1f}" for run in runs),
                f"{arm['latency_mean_s']:.1f}",
            ]
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Share of the optimum (left) and wall time (right) of every arm, by scenario."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "prefix sharing"  # the same file from the same figures
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    bars = [(s["name"], arm) for s in report["scenarios"] for arm in s["arms"]]
    places: list[float] = []
    at, before = 0.0, ""
    for scenario, _ in bars:
        at += 1.0 if scenario == before else 2.2
        before = scenario
        places.append(at)
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(11, 0.27 * at + 1.2))
    for axis, key, scale, title in zip(
        axes, ("share", "wall_s"), (100, 1), ("% of what can be shared", "wall time, s"), strict=True
    ):
        values = [scale * arm[key] for _, arm in bars]
        colours = [next(c for n, c in COLOURS.items() if arm["name"].startswith(n)) for _, arm in bars]
        axis.barh(places, values, color=colours, height=0.85)
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {value:.1f}", va="center", fontsize=7)
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlim(0, 112)
    axes[0].axvline(100, color="black", linewidth=0.5)
    axes[0].set_yticks(places, [arm["name"] for _, arm in bars])
    axes[0].invert_yaxis()
    for place, (scenario, _), first in zip(places, bars, _firsts(bars), strict=True):
        if first:
            axes[0].text(0, place - 0.95, scenario, fontsize=8, weight="bold", va="center")
    figure.suptitle(f"Sharing the prefixes of reflections, {report['device']['name']}, {report['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _firsts(bars: list[tuple[str, Any]]) -> list[bool]:
    return [index == 0 or bars[index - 1][0] != name for index, (name, _) in enumerate(bars)]


def _runs(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [run for scenario in report["scenarios"] for arm in scenario["arms"] for run in arm["runs"]]


def write(path: Path) -> list[Path]:
    """The files made from one result file."""
    report = json.loads(path.read_text())
    table = path.with_suffix(".md")
    table.write_text(f"# Sharing the prefixes of reflections\n\n{heading(report)}\n\n{markdown_table(report)}")
    plot(report, path.with_suffix(".svg"))
    return [table, path.with_suffix(".svg")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+")
    for file in parser.parse_args().file:
        print("written: " + ", ".join(map(str, write(file))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
