"""The figures of a report: which metrics are drawn together, under which title, and what to know about them.

Metrics that are not named here are drawn too, each by itself, in a section called like the first part of its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, Literal

LEARNING, VALIDATION, MEMORY = "Learning", "Validation", "Meta-experience"
POLICY, UPDATE = "Policy", "Update"
DROPPED, CACHE, WORK, TIME = "Left out, and why", "Prefix cache", "Work", "Time"


@dataclass(frozen=True, slots=True)
class Figure:
    """One chart. A metric may be a pattern; those that no run has are left out, and so is a figure without any.

    `bars` stacks the metrics, run by run. `share` fixes the axis to [0, 1].
    """

    section: str
    title: str
    metrics: tuple[str, ...]
    note: str = ""
    kind: Literal["lines", "bars"] = "lines"
    share: bool = False


FIGURES = (
    Figure(
        LEARNING, "Training reward", ("reward/correct",), "Share of right responses among all sampled ones.", share=True
    ),
    Figure(LEARNING, "Mean reward", ("reward/mean",), "Mean of the reward function, before any overlong penalty."),
    Figure(
        LEARNING,
        "Groups by outcome",
        ("groups/mixed", "groups/all_right", "groups/all_wrong"),
        "Only mixed groups have a contrast, and an advantage under a group baseline.",
        "bars",
    ),
    Figure(
        MEMORY,
        "Retention ratio",
        ("mel/retention",),
        "Kept meta-experiences over those produced, malformed ones included; 0 where none was produced.",
        share=True,
    ),
    Figure(
        MEMORY,
        "Meta-experiences",
        ("mel/pairs", "mel/replayed", "mel/kept", "mel/malformed"),
        "Contrasts reflected on, replayed, kept after their replay verified, and malformed ones.",
    ),
    Figure(
        MEMORY,
        "NLL of what is internalised",
        ("nll/*",),
        "Nats per token in the update. Retrospective: M given both solutions; heuristic: the rules given the question; "
        "replay: the validated solution given the question.",
    ),
    Figure(MEMORY, "Entropy of what is internalised", ("entropy/*",), "Nats per token of the same rows."),
    Figure(MEMORY, "Length of M", ("mel/reflection_length_mean",), "Tokens, mean over all reflections."),
    Figure(POLICY, "Entropy", ("policy/entropy",), "Nats per response token that was trained on."),
    Figure(
        POLICY, "KL to the initial policy", ("policy/kl",), "k3 estimate per token, where the objective has the term."
    ),
    Figure(POLICY, "Importance ratio", ("policy/ratio", "policy/ratio_max"), "Mean and largest; exactly 1 on-policy."),
    Figure(
        POLICY,
        "Clipped tokens",
        ("policy/clip_low", "policy/clip_high", "policy/dual_clip"),
        "Share of trained tokens whose gradient a clip removes.",
    ),
    Figure(
        POLICY,
        "Engine against trainer",
        ("policy/rollout_gap", "policy/rollout_gap_max"),
        "Absolute difference of a token's log-prob in the engine and in the trainer: mean and largest.",
    ),
    Figure(
        POLICY,
        "Staleness",
        ("rollout/staleness_mean", "rollout/staleness_max"),
        "Updates since the weights that sampled a token: mean and most; 0 where sampling and training alternate.",
    ),
    Figure(
        POLICY, "Truncated importance weights", ("policy/tis", "policy/tis_capped"), "Mean weight, and share capped."
    ),
    Figure(
        POLICY,
        "Response length",
        ("response/length_mean", "response/length_max"),
        "Tokens, with the stop token: mean and longest.",
    ),
    Figure(
        UPDATE,
        "Loss",
        ("loss/total", "loss/policy", "loss/nll"),
        "The policy's term is near 0 on-policy by construction.",
    ),
    Figure(UPDATE, "Gradient norm", ("optim/grad_norm",), "Over all parameters, before clipping."),
    Figure(
        UPDATE,
        "Gradient norms at the head's input",
        ("grad/head_policy", "grad/head_nll"),
        "How hard each of the two objectives pulls.",
    ),
    Figure(UPDATE, "Clipped updates", ("optim/grad_clipped",), "Share of optimizer steps with a clipped gradient."),
    Figure(UPDATE, "Learning rate", ("optim/lr",)),
    Figure(UPDATE, "Rows with loss", ("rows/policy", "rows/nll"), "Token positions in the update, by stream."),
    Figure(UPDATE, "Samples", ("batch/samples",), "Sequences in the update: responses, meta-experiences, replays."),
    Figure(UPDATE, "Progress", ("optim/updates", "data/epoch"), "Optimizer steps so far, and passes through the data."),
    Figure(
        DROPPED,
        "Response tokens without gradient",
        ("batch/policy_tokens", "batch/policy_tokens_dropped"),
        "All, and those left out of the update: no advantage, or masked as overlong. They stay in the denominators.",
    ),
    Figure(
        DROPPED,
        "Groups without signal",
        ("groups/all", "batch/groups", "batch/groups_without_signal"),
        "All groups, those with responses, and those whose responses all have the same advantage.",
    ),
    Figure(
        DROPPED,
        "Truncated responses",
        ("response/truncated", "budget/*"),
        "Share that met the length limit; under a gradient budget also the share of rows and gradient left out.",
    ),
    Figure(DROPPED, "Skipped updates", ("optim/skipped_updates",), "Loss or gradient was not finite on some rank."),
    Figure(DROPPED, "Masked as overlong", ("batch/masked_overlong",), "Responses, where objective.overlong=mask."),
    Figure(DROPPED, "Malformed meta-experiences", ("mel/malformed/*",), "By reason.", "bars"),
    Figure(DROPPED, "Contrasts that did not fit", ("mel/dropped/*",), "By reason.", "bars"),
    Figure(DROPPED, "Verdicts with a reason", ("verify/*",), "Responses and replays, by reason.", "bars"),
    *(
        Figure(
            CACHE,
            f"Cached prompt tokens: {phase}",
            (f"cache/{phase}/cached_share", f"cache/{phase}/optimum_share"),
            "Share that the prefix caches had, and that endless ones would have had.",
            share=True,
        )
        for phase in ("solve", "reflect", "replay")
    ),
    Figure(CACHE, "Cached tokens over the optimum", ("cache/reached_share",), "All phases: 1 is perfect.", share=True),
    Figure(CACHE, "Prompt tokens", ("cache/*/prompt_tokens",), "By phase.", "bars"),
    Figure(CACHE, "Prompt tokens that were cached", ("cache/*/cached_tokens",), "By phase.", "bars"),
    Figure(CACHE, "Prompt tokens that could be cached", ("cache/*/optimum_tokens",), "By phase.", "bars"),
    Figure(WORK, "Rollout servers", ("engine/*",), "Servers that are ready, and what they and their requests met."),
    Figure(
        WORK,
        "Computation left out",
        ("saved/*",),
        "Tokens that a pass did not have to see, counted once for every pass.",
    ),
    Figure(
        WORK,
        "Balance over ranks",
        ("balance/flops_max_over_mean",),
        "Time of a step over that of a perfect balance, by FLOPs: 1 at best.",
    ),
    Figure(
        WORK,
        "Use of micro-batches",
        ("balance/budget_fill", "balance/padding_share"),
        "Share of the token budget that is filled, and of tokens that only keep an idle rank in step.",
        share=True,
    ),
    Figure(WORK, "Micro-batches", ("balance/micro_batches",), "Per rank and step."),
    Figure(
        TIME,
        "Time by phase",
        ("time/collect", "time/build_batch", "time/update", "time/publish", "time/evaluate"),
        "Seconds per step. Evaluation is part of no step, and checkpoints are not in it.",
        "bars",
    ),
    Figure(TIME, "Time per step", ("time/step",), "Seconds, evaluation and checkpoints apart."),
    Figure(
        TIME,
        "Throughput",
        ("perf/sampled_tokens_per_s", "perf/train_tokens_per_s"),
        "Tokens per second of a step, and of its update.",
    ),
    Figure(
        TIME,
        "Tokens",
        ("perf/sampled_tokens", "perf/train_tokens", "batch/tokens"),
        "Sampled and trained on, per step.",
    ),
)


def figures(metrics: Iterable[str], samples: int | None) -> list[dict[str, Any]]:
    """Every metric in exactly one figure.

    Args:
        metrics: names that the runs have.
        samples: k of Avg@k and Pass@k, if it is known and the same for all runs.
    """
    left = dict.fromkeys(metrics)
    chosen: list[Figure] = []
    for figure in (*_evaluations(left, samples), *FIGURES):
        found = tuple(dict.fromkeys(name for metric in figure.metrics for name in left if fnmatchcase(name, metric)))
        left = {name: None for name in left if name not in found}
        chosen.append(replace(figure, metrics=found))
    chosen += [Figure(name.partition("/")[0], name, (name,)) for name in sorted(left)]
    order = list(dict.fromkeys((LEARNING, VALIDATION, *(figure.section for figure in chosen))))
    return [
        asdict(figure) for figure in sorted(chosen, key=lambda figure: order.index(figure.section)) if figure.metrics
    ]


def table(lines: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Metrics by column over the steps; None where a line does not have one. A value that is not finite is None
    too, and its step is listed under `broken`."""
    steps = sorted({int(line["step"]) for line in lines})
    place = {step: index for index, step in enumerate(steps)}
    columns: dict[str, list[float | None]] = {}
    broken: dict[str, list[int]] = {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            column = columns.setdefault(name, [None] * len(steps))
            index = place[int(line["step"])]
            if not math.isfinite(value):
                broken.setdefault(name, []).append(steps[index])
            elif column[index] is None:  # an evaluation's line repeats a few of its step's
                column[index] = float(f"{value:.6g}")
    return {"steps": steps, "columns": columns, "broken": broken}


def _evaluations(metrics: Iterable[str], samples: int | None) -> list[Figure]:
    """A figure per benchmark and score."""
    k = "k" if samples is None else str(samples)
    scores = {
        "pass_at_1": ("Pass@1", "Greedy: temperature 0."),
        "avg_at_k": (f"Avg@{k}", "Share of right answers among the sampled ones."),
        "pass_at_k": (f"Pass@{k}", "Share of problems with a right answer among the sampled ones."),
    }
    found: list[Figure] = []
    for metric in metrics:
        name, _, score = metric.removeprefix("eval/").rpartition("/")  # a name may have slashes of its own
        if metric.startswith("eval/") and score in scores:
            title, note = scores[score]
            found.append(Figure(VALIDATION, f"{name}: {title}", (escape(metric),), note, share=True))
    return found
