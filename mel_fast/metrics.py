"""What a step reports. Names are `group/name`; only `time/...` and `perf/...` vary between equal runs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from mel_fast.packing import KINDS, loss_rows
from mel_fast.rollout.prefixes import as_bytes, shareable_tokens
from mel_fast.types import Episode, Sample


def rollout_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What was sampled in one step, and what became of it."""
    responses = [t for e in episodes for t in e.trajectories]
    lengths = [len(t.output_ids) for t in responses]
    mixed = [e for e in episodes if len({t.correct for t in e.trajectories}) == 2]
    experiences = [x for e in episodes for x in e.experiences]
    well_formed = [x for x in experiences if x.meta is not None]
    kept = [x for x in experiences if x.kept]
    metrics = {
        "reward/mean": _mean([t.reward for t in responses]),
        "reward/correct": _mean([float(t.correct) for t in responses]),
        "response/length_mean": _mean(lengths),
        "response/length_max": float(max(lengths, default=0)),
        "response/truncated": _mean([float(t.finish_reason == "length") for t in responses]),
        "groups/all": float(len(episodes)),
        "groups/mixed": float(len(mixed)),
        "groups/all_right": float(sum(all(t.correct for t in e.trajectories) for e in episodes)),
        "groups/all_wrong": float(sum(not any(t.correct for t in e.trajectories) for e in episodes)),
        "mel/pairs": float(len(experiences)),
        "mel/malformed": float(len(experiences) - len(well_formed)),
        "mel/replayed": float(sum(x.replay is not None for x in experiences)),
        "mel/kept": float(len(kept)),
        "mel/retention": len(kept) / len(experiences) if experiences else 0.0,
        "mel/reflection_length_mean": _mean([len(x.reflection.output_ids) for x in experiences]),
    }
    for reason, count in Counter(x.malformed for x in experiences if x.malformed).items():
        metrics[f"mel/malformed/{_key(reason)}"] = float(count)
    for episode in episodes:
        for reason, count in episode.dropped.items():
            metrics[f"mel/dropped/{reason}"] = metrics.get(f"mel/dropped/{reason}", 0.0) + count
    replays = [x.replay for x in experiences if x.replay is not None]
    for reason, count in Counter(t.reason for t in [*responses, *replays] if t.reason).items():
        metrics[f"verify/{_key(reason)}"] = float(count)
    return metrics | cache_metrics(episodes)


def cache_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What the engine's prefix cache saved, beside the most that the step's own requests could have shared: the
    optimum. Empty when the engine has no such cache.

    The optimum is that of an endless cache that meets the requests one after another. Requests can share what was
    computed by the same cache (one server between two restarts) under the same weights (publishing empties it). A
    prefix that phases have in common counts for the later one, so that the phases add up to the whole.
    """
    experiences = [x for e in episodes for x in e.experiences]
    phases = {
        "solve": [t for e in episodes for t in e.trajectories],
        "reflect": [x.reflection for x in experiences],
        "replay": [x.replay for x in experiences if x.replay is not None],
    }
    if all(t.cached_tokens is None for trajectories in phases.values() for t in trajectories):
        return {}
    metrics: dict[str, float] = {}
    met: defaultdict[tuple[str, int], list[bytes]] = defaultdict(list)
    saved = best = 0
    for phase, trajectories in phases.items():
        for t in trajectories:
            met[t.cache, t.versions[0][0]].append(as_bytes(t.prompt_ids))
        prompt = sum(len(t.prompt_ids) for t in trajectories)
        cached = sum(t.cached_tokens or 0 for t in trajectories)
        before, best = best, sum(map(shareable_tokens, met.values()))
        saved += cached
        metrics[f"cache/{phase}/prompt_tokens"] = float(prompt)
        metrics[f"cache/{phase}/cached_tokens"] = float(cached)
        metrics[f"cache/{phase}/optimum_tokens"] = float(best - before)
        if prompt:
            metrics[f"cache/{phase}/cached_share"] = cached / prompt
            metrics[f"cache/{phase}/optimum_share"] = (best - before) / prompt
    if best:
        metrics["cache/reached_share"] = saved / best
    return metrics


def staleness_metrics(episodes: Sequence[Episode], version: int) -> dict[str, float]:
    """How many updates old the weights were that sampled what is trained on now: 0 for every token on-policy.

    Args:
        version: of the policy before the update.
    """
    spans = [(version - sampled, tokens) for e in episodes for t in e.trajectories for sampled, tokens in t.versions]
    tokens = sum(count for _, count in spans)
    return {
        "rollout/staleness_mean": sum(age * count for age, count in spans) / tokens if tokens else 0.0,
        "rollout/staleness_max": float(max((age for age, _ in spans), default=0)),
    }


def loss_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums over all rows of a step (kernels' metrics and `kind/...`) -> means, shares and norms."""
    metrics: dict[str, float] = {"loss/total": sums["policy/loss"] + sums["nll/loss"]}
    for stream in ("policy", "nll"):
        metrics[f"loss/{stream}"] = sums[f"{stream}/loss"]
        metrics[f"rows/{stream}"] = sums[f"{stream}/rows"]
        if f"{stream}/grad_sq" in sums:  # the fused loss knows it
            metrics[f"grad/head_{stream}"] = math.sqrt(sums[f"{stream}/grad_sq"])
    if whole := sums.get("policy/grad_l1", 0.0) + sums.get("nll/grad_l1", 0.0):  # there is a gradient budget
        rows = sums["policy/rows"] + sums["nll/rows"]
        metrics["budget/rows"] = (sums["policy/dropped_rows"] + sums["nll/dropped_rows"]) / rows
        metrics["budget/gradient"] = (sums["policy/dropped_l1"] + sums["nll/dropped_l1"]) / whole
        metrics["saved/gradient_budget"] = sums["policy/dropped_rows"] + sums["nll/dropped_rows"]
    if rows := sums["policy/rows"]:
        for name in (
            "entropy",
            "ratio",
            "clip_low",
            "clip_high",
            "dual_clip",
            "kl",
            "tis",
            "tis_capped",
            "rollout_gap",
        ):
            if f"policy/{name}" in sums:
                metrics[f"policy/{name}"] = sums[f"policy/{name}"] / rows
        for name in ("ratio_max", "rollout_gap_max"):
            if f"policy/{name}" in sums:
                metrics[f"policy/{name}"] = sums[f"policy/{name}"]
    for kind in KINDS:
        if kind != "policy" and (rows := sums[f"kind/{kind}/rows"]):
            metrics[f"nll/{kind}"] = sums[f"kind/{kind}/nll"] / rows
            metrics[f"entropy/{kind}"] = sums[f"kind/{kind}/entropy"] / rows
    return metrics


def saved_metrics(
    updates: Sequence[Sequence[Sample]], epochs: int, old_logps: bool, reference: bool
) -> dict[str, float]:
    """What an update did not compute, in tokens (counted once for every pass left out).

    `saved/old_logp_pass`, `saved/reference_pass`: forward passes over the policy's sequences, which are not run
    on-policy (the ratio is 1) and without KL. `saved/head_rows`: positions without loss, which never reach the head, in
    the passes that are run. With these belong `saved/zero_advantage` (see `objective.build_batch`), whole sequences,
    and `saved/gradient_budget` (see `loss_metrics`), rows left out of the head's backward alone.

    Nothing is saved where sequences have a prefix in common: the prompt of a group, and the question in the forms of
    one experience, are run once per sequence.

    Args:
        updates: the samples of each optimizer step.
        epochs: passes over them.
        old_logps: whether the pass for old log-probs is run.
        reference: whether the reference's is.
    """
    samples = [sample for update in updates for sample in update]
    policy = sum(len(sample.ids) for sample in samples if sample.kind == "policy")
    without_loss = sum(len(sample.ids) - loss_rows(sample) for sample in samples)
    return {
        "saved/old_logp_pass": 0.0 if old_logps else float(policy),
        "saved/reference_pass": 0.0 if reference else float(policy),
        "saved/head_rows": float(without_loss * (epochs + old_logps + reference)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _key(reason: str) -> str:
    return reason.replace(" ", "_")
