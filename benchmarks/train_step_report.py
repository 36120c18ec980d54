"""Table and plot of a result file of the train-step benchmark.

    python -m benchmarks.train_step_report benchmarks/results/train-step-cpu-tiny-2026-11-24.json

Writes FILE.md and, where matplotlib is installed, FILE.svg beside the JSON file, from what is in it and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

PHASES = {"pack": "#b8b8b8", "forward": "#3d7ea6", "backward": "#1b7f5c", "optimizer": "#c46a1b", "rest": "#7a7a7a"}
YARDSTICKS = ("trl", "plain")


def heading(report: dict[str, Any]) -> str:
    """What was measured, where and how."""
    device = report["device"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items() if version)
    peers = ", ".join(f"{name} {version or 'absent'}" for name, version in report["peers"].items())
    where = f"{device['name']}" + (f", threads: {device['threads']}" if "threads" in device else "")
    return (
        f"{report['date']}, {where}. {versions}. Peers: {peers}. `{report['command']}`. Shape {report['shape']}, "
        f"{report['dtype']}, {report['token_budget']} tokens per micro-batch, "
        f"gradient checkpointing: {report['checkpointing']}."
    )


def markdown_table(report: dict[str, Any]) -> str:
    """One table per workload."""
    parts: list[str] = []
    rate = "MFU" if report["peak_flops"] else "GFLOP/s"
    columns = ("", "ms per update (middle half)", "tokens/s", *(f"x {name}" for name in YARDSTICKS), rate, "peak, MiB")
    columns += (*PHASES, "loss", "norm", "direction")
    for found in report["workloads"]:
        idle, memos = found["zero_advantage"], found["memos"]
        parts += [
            f"### {found['name']}",
            "",
            f"{found['sequences']} sequences of up to {found['longest']} tokens, {found['tokens']} in all, "
            f"{found['tokens_with_loss']} of them responses or reflections; of advantage 0: {idle['sequences']} "
            f"sequences, {idle['tokens']} tokens; reflections: {memos['sequences']}, {memos['tokens']} tokens; "
            f"{found['needed_flops'] / 1e9:.4g} GFLOP needed; fingerprint {found['fingerprint']}.",
            "",
            "| " + " | ".join(columns) + " |",
            "|---|" + "---:|" * (len(columns) - 1),
        ]
        parts += [_row(entry, found, report["peak_flops"]) for entry in found["contenders"] if entry["status"] == "ok"]
        failed = [f"- **{entry['name']}**: {_why(entry)}" for entry in found["contenders"] if entry["status"] != "ok"]
        parts += ["", *failed, *([""] if failed else [])]
    return "\n".join(parts)


def _row(entry: dict[str, Any], workload: dict[str, Any], peak: float | None) -> str:
    low, high = entry["quartiles_ms"]
    rates = {each["name"]: each["tokens_per_s"] for each in workload["contenders"] if each["status"] == "ok"}
    flops = entry["flops_per_s"]
    cells = [
        entry["name"],
        f"{entry['median_ms']:.0f} ({low:.0f} to {high:.0f})",
        f"{entry['tokens_per_s']:,.0f}",
        *(f"{entry['tokens_per_s'] / rates[name]:.2f}" if name in rates else "" for name in YARDSTICKS),
        f"{flops / peak:.1%}" if peak else f"{flops / 1e9:.1f}",
        "" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**20:,.0f}",
        *(f"{entry['phases_ms'].get(name, 0):.0f}" for name in PHASES),
        *(f"{entry['errors'][name]:.0e}" for name in ("loss", "norm", "angle")),
    ]
    return "| " + " | ".join(cells) + " |"


def _why(entry: dict[str, Any]) -> str:
    prefix = {"gate": "no time, it failed the gate", "failed": "did not run"}.get(entry["status"], entry["status"])
    return f"{prefix}: {entry['reason']}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Milliseconds per update, by phase; one panel per workload."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "train step"  # the same file from the same figures
    pyplot: Any = importlib.import_module("matplotlib.pyplot")

    workloads = report["workloads"]
    figure, axes = pyplot.subplots(1, len(workloads), squeeze=False, figsize=(7.0 * len(workloads), 3.4))
    for axis, found in zip(axes.flat, workloads, strict=True):
        timed = [entry for entry in found["contenders"] if entry["status"] == "ok"][::-1]
        ends = [0.0] * len(timed)
        for phase, colour in PHASES.items():
            # The phases come from an update of their own; their shares are drawn at the length of the median.
            values = [
                entry["median_ms"] * entry["phases_ms"].get(phase, 0.0) / sum(entry["phases_ms"].values())
                for entry in timed
            ]
            axis.barh([entry["name"] for entry in timed], values, left=ends, color=colour, label=phase)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        for position, entry in enumerate(timed):
            axis.text(ends[position], position, f" {entry['tokens_per_s']:,.0f} tokens/s", va="center", fontsize=8)
        axis.set_xlim(0, 1.3 * max(ends, default=1.0))
        axis.set_title(f"{found['name']}: {found['tokens']} tokens", fontsize=9)
        axis.set_xlabel("ms per update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[-1].legend(fontsize=7, loc="center right")
    device = report["device"]
    title = f"{report['shape']}, {report['dtype']}, {device['name']}, {report['date']}"
    figure.suptitle(f"{title}, torch {device['versions']['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(path: Path) -> list[Path]:
    """The files made from one result file."""
    report = json.loads(path.read_text())
    table = path.with_suffix(".md")
    table.write_text(f"# The update of a training step\n\n{heading(report)}\n\n{markdown_table(report)}")
    try:
        plot(report, path.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return [table]
    return [table, path.with_suffix(".svg")]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+")
    for file in parser.parse_args().file:
        print("written: " + ", ".join(map(str, write(file))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
