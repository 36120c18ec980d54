"""Tables and plots of a result file of the study.

    python -m benchmarks.study_report benchmarks/results/study-2026-11-25.json

Writes FILE.md, FILE-differences.svg, FILE-curves.svg and FILE-gradients.svg beside the JSON file, from what is in it
and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study_arms import ARMS, WORLDS
from benchmarks.study_figures import Figures, known, probability, score, smoothed

COLOURS = {"baseline": "#5b5b5b", "MEL": "#1b7f5c", "control": "#c46a1b", "attempt": "#4a6fb5"}
PAIRS = (
    ("paper+replay", "MEL"),
    ("paper+replay", "right"),
    ("paper+replay", "opening"),
    ("replay", "right"),
    ("MEL", "unvalidated"),
    ("MEL", "critique"),
)
"""Arms that are compared with each other, beside their baselines."""
CURVES = ("GRPO", "MEL", "paper+replay", "replay", "right", "opening")


def heading(report: dict[str, Any]) -> str:
    """What was measured, where and how."""
    versions = ", ".join(f"{name} {version}" for name, version in report["device"]["versions"].items() if version)
    seeds = sorted({trial["seed"] for trial in report["trials"]})
    sweep = sorted({row["seed"] for row in report["sweep"]})
    return (
        f"{report['date']}, {report['device']['name']}. {versions}. `{report['command']}`.\n\n"
        f"{report['steps']} steps of 16 prompts with 8 responses; worlds, warm starts and runs of seeds {seeds}, the "
        f"same for each arm; learning rates chosen per arm in worlds {sweep}. Differences are to the baseline above, "
        "paired by seed, with bootstrap 95% intervals over the seeds. `p(rule)`: probability of the right rule where a "
        "solution names it, on unseen numbers, without sampling noise (where solutions name none: of the whole right "
        "solution). `equal tokens`: share of right rollouts, in windows of five steps, when as many tokens were "
        "sampled as by the baseline in its last window. `untrained`: what the right rule's probability gained on "
        "topics that are never trained on.\n"
    )


def table(figures: Figures, world: str) -> str:
    """One row per arm."""
    siblings = ("Avg@8 of siblings", "p(rule) of siblings") if world == "guilds" else ()
    columns = ["arm", "role", "lr", "Pass@1", "Avg@8", "Pass@8", "p(rule)", "Avg@8 to baseline", "p(rule) to baseline"]
    columns += [f"{name} to baseline" for name in siblings]
    columns += ["equal tokens", "untrained", "retention", "NLL rows", "tokens"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for name in figures.arms(world):
        arm, first = ARMS[name], next(iter(figures.runs[world, name].values()))
        compared = arm.base != name
        measures = [score("avg_at_k"), known(world)]
        measures += [score("avg_at_k", "sibling"), probability("rule/sibling")] if siblings else []
        cells = [
            arm.title,
            arm.role,
            f"{first['rate']:g}",
            *(f"{figures.mean(world, name, score(key)):.3f}" for key in ("pass_at_1", "avg_at_k", "pass_at_k")),
            f"{figures.mean(world, name, known(world)):.3f}",
            *(str(figures.difference(world, name, measure)) if compared else "" for measure in measures),
            str(figures.at_equal_tokens(world, name)) if compared else "",
            f"{figures.leak(world, name).mean:+.3f}",
            f"{figures.mean(world, name, lambda run: run['means']['mel/retention']):.2f}"
            if first["means"]["mel/pairs"]
            else "",
            f"{figures.mean(world, name, lambda run: run['means']['rows/nll']):.0f}",
            f"{figures.mean(world, name, lambda run: float(np.mean(run['sampled_tokens']))):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pair_table(figures: Figures, world: str) -> str:
    """Differences between arms; empty when the world has none of the pairs."""
    pairs = [(ours, theirs) for ours, theirs in PAIRS if {(world, ours), (world, theirs)} <= figures.runs.keys()]
    if not pairs:
        return ""
    lines = ["| arm | less | Avg@8 | p(rule) | equal tokens |", "|---|---|---:|---:|---:|"]
    for ours, theirs in pairs:
        found = [figures.difference(world, ours, measure, theirs) for measure in (score("avg_at_k"), known(world))]
        cells = [ours, theirs, *map(str, found), str(figures.at_equal_tokens(world, ours, theirs))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def gradient_table(report: dict[str, Any]) -> str:
    """Means over the worlds, with the standard deviation of the cosines."""
    lines = ["| term | norm | cosine with the right rule | cosine with the surrogate |", "|---|---:|---:|---:|"]
    for term in dict.fromkeys(row["term"] for row in report["gradients"]):
        rows = [row for row in report["gradients"] if row["term"] == term]
        cosines = (np.array([row[key] for row in rows]) for key in ("cosine_helpful", "cosine_surrogate"))
        shown = " | ".join(f"{values.mean():.2f} (sd {values.std():.2f})" for values in cosines)
        lines.append(f"| {term} | {np.mean([row['norm'] for row in rows]):.3f} | {shown} |")
    return "\n".join(lines) + "\n"


def plot_differences(figures: Figures, path: Path) -> None:
    """Differences of Avg@8 to the baseline, one panel per world."""
    worlds = [world for world in WORLDS if figures.arms(world)]
    rows = {world: [name for name in figures.arms(world) if ARMS[name].base != name] for world in worlds}
    pyplot = _pyplot()
    heights = [len(rows[world]) + 1.5 for world in worlds]
    figure, axes = pyplot.subplots(
        len(worlds), 1, sharex=True, figsize=(9, 0.27 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    for axis, world in zip(axes[:, 0], worlds, strict=True):
        for place, name in enumerate(rows[world]):
            found, colour = figures.difference(world, name, score("avg_at_k")), COLOURS[ARMS[name].role]
            axis.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
            axis.plot(found.each, [place] * len(found.each), "|", color=colour, markersize=7, alpha=0.6)
            axis.plot(found.mean, place, "o", color=colour, markersize=5)
        base = [f" ({ARMS[name].base})" if ARMS[name].base != "GRPO" else "" for name in rows[world]]
        axis.set_yticks(
            range(len(rows[world])), [ARMS[n].title + b for n, b in zip(rows[world], base, strict=True)], fontsize=7
        )
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.7)
        axis.set_title(f"{world}: {WORLDS[world][0]}", fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        "Avg@8 on held-out problems, difference to the baseline; bars: 95% intervals, ticks: single worlds", fontsize=8
    )
    _save(figure, path)


def plot_curves(figures: Figures, path: Path) -> None:
    """Share of right rollouts over sampled tokens, mean over the seeds."""
    worlds = [world for world in WORLDS if figures.arms(world)]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(worlds), sharey=True, figsize=(4 * len(worlds) + 1, 3.4), squeeze=False)
    for axis, world in zip(axes[0], worlds, strict=True):
        for name in (name for name in CURVES if (world, name) in figures.runs):
            curves = [smoothed(run) for run in figures.runs[world, name].values()]
            tokens, correct = (np.mean([curve[part] for curve in curves], axis=0) for part in (0, 1))
            style = "--" if ARMS[name].role == "control" else "-"
            axis.plot(tokens / 1000, correct, style, label=name, linewidth=1.6)
        axis.set_title(world, fontsize=9, loc="left")
        axis.set_xlabel("thousand sampled tokens", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("right rollouts", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    _save(figure, path)


def plot_gradients(report: dict[str, Any], path: Path) -> None:
    """Cosine of each term with the direction that raises the right rule, against its norm."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for term in dict.fromkeys(row["term"] for row in report["gradients"]):
        rows = [row for row in report["gradients"] if row["term"] == term]
        norm, cosine = (float(np.mean([row[key] for row in rows])) for key in ("norm", "cosine_helpful"))
        axis.plot(norm, cosine, "o", markersize=5)
        axis.annotate(term, (norm, cosine), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axis.set_xscale("log")
    axis.set_xlabel("norm of the gradient", fontsize=8)
    axis.set_ylabel("cosine with raising the right rule", fontsize=8)
    axis.axhline(0, color="black", linewidth=0.7)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _pyplot() -> Any:
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same file from the same figures
    return importlib.import_module("matplotlib.pyplot")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)


def write(path: Path) -> list[Path]:
    """The files made from one result file."""
    report = json.loads(path.read_text())
    figures = Figures(report)
    parts = ["# Meta-Experience Learning in the embedded world", heading(report)]
    for world, (about, _) in WORLDS.items():
        if figures.arms(world):
            parts += [f"## {world}: {about}", table(figures, world), pair_table(figures, world)]
    written = [path.with_suffix(".md"), path.with_name(f"{path.stem}-differences.svg")]
    written.append(path.with_name(f"{path.stem}-curves.svg"))
    plot_differences(figures, written[1])
    plot_curves(figures, written[2])
    if report["gradients"]:
        parts += ["## Gradients at the warm-started policy", gradient_table(report)]
        written.append(path.with_name(f"{path.stem}-gradients.svg"))
        plot_gradients(report, written[3])
    written[0].write_text("\n".join(parts))
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+")
    for file in parser.parse_args(arguments).file:
        print("written: " + ", ".join(map(str, write(file))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
