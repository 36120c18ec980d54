"""Table and picture of a result file of the overlap benchmark.

    python -m benchmarks.overlap_report benchmarks/results/overlap-cpu-2026-11-25.json

Writes FILE.md and FILE.svg beside the JSON file, from what is in it and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = {"solve": "#b8b8b8", "reflect": "#c46a1b", "replay": "#1b7f5c"}


def heading(report: dict[str, Any]) -> str:
    """What was measured, where and how."""
    device, lengths = report["device"], report["lengths"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items() if version)
    runs = [run for schedule in report["schedules"] for run in schedule["runs"]]
    loads = [run["load"] for run in runs]
    medians = ", ".join(f"{phase} {median:.0f}" for phase, median in lengths["median"].items())
    return (
        f"{report['date']}, {device['name']}, load average {min(loads):.1f} to {max(loads):.1f} on a shared machine "
        f"of 2 cores. {versions}, SGLang {report['sglang']}. `{report['command']}`.\n\n"
        f"Imposed time of a forward pass: {report['times']}; passes took up to "
        f"{max(run['late_share'] for run in runs):.0%} of a run longer than that. {report['prompts']} prompts, "
        f"{report['group_size']} rollouts each, 2 reflections and replays each. Tokens of an answer: log-normal, "
        f"medians {medians}, sigma {lengths['sigma']}, at most {lengths['longest']}."
    )


def markdown_table(report: dict[str, Any]) -> str:
    parts = [
        "| schedule | wall, s | of each run | cost beyond rollouts, s | requests, mean | busy | share of the optimum |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for schedule in report["schedules"]:
        runs = schedule["runs"]
        cost = report["cost_s"].get(schedule["name"])
        cells = [
            schedule["name"],
            f"{schedule['wall_s']:.1f}",
            ", ".join(f"{run['wall_s']:.1f}" for run in runs),
            "" if cost is None else f"{cost:.1f}",
            f"{np.median([run['mean_requests'] for run in runs]):.1f}",
            f"{np.median([run['busy_share'] for run in runs]):.0%}",
            f"{np.median([run['reached_share'] for run in runs]):.1%}",
        ]
        parts.append("| " + " | ".join(cells) + " |")
    return "\n".join([*parts, "", f"Cost with overlap over cost with barriers: {report['cost_ratio']:.0%}.", ""])


def plot(report: dict[str, Any], path: Path) -> None:
    """Requests under way over time by phase, of the run of median wall time of each schedule."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "overlap"  # the same file from the same figures
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    schedules = report["schedules"]
    figure, axes = pyplot.subplots(len(schedules), 1, sharex=True, sharey=True, figsize=(9, 1.7 * len(schedules) + 0.8))
    for axis, schedule in zip(axes, schedules, strict=True):
        runs = sorted(schedule["runs"], key=lambda run: run["wall_s"])
        shown = runs[len(runs) // 2]
        times = np.linspace(0, shown["wall_s"], 300)
        counts = [_under_way(shown["requests"], phase, times) for phase in COLOURS]
        axis.stackplot(times, counts, colors=list(COLOURS.values()), labels=list(COLOURS))
        axis.axvline(shown["wall_s"], color="black", linewidth=0.7)
        axis.set_title(f"{schedule['name']}: {shown['wall_s']:.1f} s", fontsize=9, loc="left")
        axis.set_ylabel("requests", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("s", fontsize=8)
    axes[0].legend(fontsize=7, loc="upper right")
    figure.suptitle(f"Requests under way, {report['device']['name']}, {report['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _under_way(requests: list[list[Any]], phase: str, times: np.ndarray) -> np.ndarray:
    """How many of the phase's are under way at each of the times."""
    starts = np.sort([start for name, start, _ in requests if name == phase])
    ends = np.sort([end for name, _, end in requests if name == phase])
    return np.searchsorted(starts, times, side="right") - np.searchsorted(ends, times, side="right")


def write(path: Path) -> list[Path]:
    """The files made from one result file."""
    report = json.loads(path.read_text())
    table = path.with_suffix(".md")
    table.write_text(f"# Reflection and replay beside the rollouts\n\n{heading(report)}\n\n{markdown_table(report)}")
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
