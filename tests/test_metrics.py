"""What a step reports."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from factories import as_any, episode, experience, trajectory
from hypothesis import given
from hypothesis import strategies as st
from mel_kernels import LossConfig
from rich.console import Console
from support import random_samples

from mel_fast.console import COLUMNS, Display
from mel_fast.distributed import World
from mel_fast.evaluate import Score
from mel_fast.internalise import Internalise
from mel_fast.learner import Learner, OptimConfig
from mel_fast.metrics import cache_metrics, loss_metrics, rollout_metrics, saved_metrics, staleness_metrics
from mel_fast.model import ModelConfig
from mel_fast.objective import ObjectiveConfig, build_batch
from mel_fast.packing import KINDS
from mel_fast.policy import load_policy
from mel_fast.rollout.prefixes import as_bytes, shareable_tokens
from mel_fast.types import Episode, Experience, Trajectory


def test_rollouts_are_counted() -> None:
    mixed = episode([1, 0, 0, 0], [3, 5, 2, 10])
    mixed.trajectories[3].finish_reason = "length"
    mixed.trajectories[1].reason = "no answer"
    metrics = rollout_metrics([mixed, episode([1, 1]), episode([0, 0]), episode([0.5, 0])])
    expected = {
        "reward/mean": 3.5 / 10,
        "reward/correct": 3 / 10,
        "response/length_mean": (3 + 5 + 2 + 10 + 6 * 2) / 10,
        "response/length_max": 10,
        "response/truncated": 1 / 10,
        "groups/all": 4,
        "groups/mixed": 1,
        "groups/all_right": 1,
        "groups/all_wrong": 2,
        "verify/no_answer": 1,
        "mel/pairs": 0,
        "mel/retention": 0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_experiences_are_counted() -> None:
    failed = experience(kept=False, memo=5)
    assert failed.replay is not None
    failed.replay.reason = "timeout"
    unplayed = experience(kept=False, memo=6)
    unplayed.replay = None
    bad = [
        Experience(0, 1, trajectory(length=2), None, reason) for reason in ("no critique", "no critique", "truncated")
    ]
    found = [experience(memo=3), failed, unplayed, *bad]
    made, other = episode([1, 0], experiences=found), episode([1, 1])
    made.dropped, other.dropped = {"replay_beyond_context": 1}, {"replay_beyond_context": 2}
    metrics = rollout_metrics([made, other])
    expected = {
        "mel/pairs": 6,
        "mel/malformed": 3,
        "mel/malformed/no_critique": 2,
        "mel/malformed/truncated": 1,
        "mel/replayed": 2,
        "mel/kept": 1,
        "mel/retention": 1 / 6,
        "mel/reflection_length_mean": (3 + 5 + 6 + 2 + 2 + 2) / 6,
        "mel/dropped/replay_beyond_context": 3,
        "verify/timeout": 1,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_staleness_is_counted_in_updates_over_tokens() -> None:
    fresh, mixed = trajectory(length=4), trajectory(length=4)
    fresh.versions, mixed.versions = [(7, 4)], [(6, 3), (7, 1)]
    made = episode([1, 0])
    made.trajectories[:] = [fresh, mixed]
    assert staleness_metrics([made], 7) == {"rollout/staleness_mean": 3 / 8, "rollout/staleness_max": 1.0}
    assert staleness_metrics([], 7) == {"rollout/staleness_mean": 0.0, "rollout/staleness_max": 0.0}


def test_a_step_without_episodes_has_finite_metrics() -> None:
    assert all(math.isfinite(value) for value in rollout_metrics([]).values())


# --- prefix caches ----------------------------------------------------------------------------------------------------


def served(prompt: list[int], cached: int, cache: str = "a", version: int = 0) -> Trajectory:
    found = trajectory(context=prompt)
    found.cached_tokens, found.cache, found.versions = cached, cache, [(version, 2)]
    return found


def group(*rollouts: Trajectory, reflections: Sequence[Trajectory] = (), replays: Sequence[Trajectory] = ()) -> Episode:
    made = episode([1, 0])
    made.trajectories[:] = rollouts
    pairs = zip_longest(reflections, replays)
    made.experiences = [Experience(0, 1, reflection, None, replay=replay) for reflection, replay in pairs]
    return made


def test_each_phase_reports_what_was_cached_and_what_could_have_been() -> None:
    head, question, wrong = [1, 2], [3, 4, 5], [6, 7]
    solve = [*head, *question]  # twice: all but the last token can be shared
    reflect = [*head, 9, *question, *wrong]
    made = group(
        served(solve, 0),
        served(solve, 4),
        reflections=[served([*reflect, 10], 2), served([*reflect, 11], 0)],
        replays=[served([*head, 8, 8], 2)],
    )
    expected = {
        "cache/solve/prompt_tokens": 10,
        "cache/solve/cached_tokens": 4,
        "cache/solve/optimum_tokens": 4,
        "cache/solve/cached_share": 0.4,
        "cache/solve/optimum_share": 0.4,
        "cache/reflect/prompt_tokens": 18,
        "cache/reflect/cached_tokens": 2,
        "cache/reflect/optimum_tokens": 2 + 8,  # the head from the rollouts, the second all but its last token
        "cache/reflect/cached_share": 2 / 18,
        "cache/reflect/optimum_share": 10 / 18,
        "cache/replay/prompt_tokens": 4,
        "cache/replay/cached_tokens": 2,
        "cache/replay/optimum_tokens": 2,
        "cache/replay/cached_share": 0.5,
        "cache/replay/optimum_share": 0.5,
        "cache/reached_share": 8 / 16,
    }
    assert cache_metrics([made]) == pytest.approx(expected)
    assert expected.keys() <= rollout_metrics([made]).keys()


@pytest.mark.parametrize("other", [{"cache": "b"}, {"version": 1}])
def test_nothing_is_shared_between_servers_nor_across_an_update(other: dict[str, Any]) -> None:
    prompt = [1, 2, 3, 4]
    apart = [group(served(prompt, 0), served(prompt, 0, **other)), group(served(prompt, 3), served(prompt, 3, **other))]
    metrics = cache_metrics(apart)
    assert metrics["cache/solve/optimum_tokens"] == 6
    assert metrics["cache/reached_share"] == 1


def test_groups_of_one_cache_share_across_prompts() -> None:
    metrics = cache_metrics([group(served([1, 2, 3], 0)), group(served([1, 2, 4], 2))])
    assert metrics["cache/solve/optimum_tokens"] == 2


@given(st.lists(st.tuples(*[st.lists(st.integers(0, 2), min_size=1, max_size=5)] * 3), min_size=1, max_size=6))
def test_the_phases_optima_add_up_to_that_of_all_requests(prompts: list[tuple[list[int], ...]]) -> None:
    made = [group(served(a, 0), reflections=[served(b, 0)], replays=[served(c, 0)]) for a, b, c in prompts]
    metrics = cache_metrics(made)
    total = sum(metrics[f"cache/{phase}/optimum_tokens"] for phase in ("solve", "reflect", "replay"))
    assert total == shareable_tokens([as_bytes(prompt) for triple in prompts for prompt in triple])


def test_an_engine_without_a_prefix_cache_reports_none() -> None:
    assert cache_metrics([episode([1, 0], experiences=[experience()])]) == {}


def sums(policy_rows: float = 4.0) -> dict[str, float]:
    """As the fused loss and the learner add them up."""
    found: dict[str, float] = {}
    for stream, rows in (("policy", policy_rows), ("nll", 2.0)):
        found |= {f"{stream}/rows": rows, f"{stream}/loss": 0.5, f"{stream}/entropy": 6.0, f"{stream}/grad_sq": 9.0}
    found |= {f"policy/{name}": 1.0 for name in ("ratio", "clip_low", "clip_high", "dual_clip", "rollout_gap")}
    found |= {"policy/ratio_max": 3.0, "policy/rollout_gap_max": 2.0}
    for kind in KINDS:
        found |= {f"kind/{kind}/{name}": 0.0 for name in ("rows", "nll", "entropy")}
    return found | {"kind/heuristic/rows": 2.0, "kind/heuristic/nll": 5.0, "kind/heuristic/entropy": 3.0}


def test_sums_of_the_loss_become_means_norms_and_maxima() -> None:
    metrics = loss_metrics(sums())
    expected = {
        "loss/total": 1.0,
        "loss/policy": 0.5,
        "rows/nll": 2.0,
        "grad/head_policy": 3.0,
        "policy/entropy": 1.5,
        "policy/clip_low": 0.25,
        "policy/ratio_max": 3.0,
        "policy/rollout_gap_max": 2.0,
        "nll/heuristic": 2.5,
        "entropy/heuristic": 1.5,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert "nll/retrospective" not in metrics  # no rows: no mean
    assert not any(name.startswith("policy/") for name in loss_metrics(sums(policy_rows=0.0)))


def test_rows_that_the_gradient_budget_left_out_are_counted() -> None:
    found = sums()
    for stream in ("policy", "nll"):
        found |= {f"{stream}/grad_l1": 4.0, f"{stream}/dropped_l1": 0.5, f"{stream}/dropped_rows": 1.0}
    metrics = loss_metrics(found)
    assert metrics["saved/gradient_budget"] == 2.0
    assert metrics["budget/rows"] == pytest.approx(2 / 6)
    assert "saved/gradient_budget" not in loss_metrics(sums())


@pytest.mark.parametrize(("epochs", "old_logps", "reference"), [(1, False, False), (2, True, False), (1, False, True)])
def test_passes_and_head_rows_that_were_not_run_are_counted(epochs: int, old_logps: bool, reference: bool) -> None:
    first, second = random_samples(50, seed=0), random_samples(50, seed=1)
    metrics = saved_metrics([first, second], epochs, old_logps, reference)
    policy = sum(len(s.ids) for s in (*first, *second) if s.kind == "policy")
    context = sum(int((s.stream == 0).sum()) for s in (*first, *second))
    assert metrics["saved/old_logp_pass"] == (0 if old_logps else policy)
    assert metrics["saved/reference_pass"] == (0 if reference else policy)
    assert metrics["saved/head_rows"] == context * (epochs + old_logps + reference)
    assert 0 < policy < sum(len(s.ids) for s in (*first, *second))


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_sequences_without_advantage_that_were_left_out_are_counted(kl: float) -> None:
    """Prompts of 3 tokens. A KL term needs them all."""
    episodes = [episode([1, 0], [4, 5]), episode([1, 1], [6, 7])]
    batch = build_batch(episodes, ObjectiveConfig(kl_coef=kl), Internalise(), 1.0, 10, 1.0, as_any(None))
    assert batch.metrics["saved/zero_advantage"] == (0 if kl else 3 + 6 + 3 + 7)
    assert batch.metrics["batch/policy_tokens"] == 4 + 5 + 6 + 7


def test_an_update_reports_its_balance_and_what_it_saved(model_folder: Path, world: World) -> None:
    samples = random_samples(400)
    policy, tokens = (sum(len(s.ids) for s in samples if s.kind in kinds) for kinds in (("policy",), KINDS))
    reports = []
    for epochs in (1, 2):
        settings = OptimConfig(token_budget=100, epochs=epochs)
        learner = Learner(load_policy(ModelConfig(path=str(model_folder)), world), None, settings, 4, world)
        reports.append(learner.update([samples], LossConfig()))
    on_policy, off_policy = reports
    assert on_policy["saved/old_logp_pass"] == on_policy["saved/reference_pass"] == policy
    assert off_policy["saved/old_logp_pass"] == 0
    rows = on_policy["rows/policy"] + on_policy["rows/nll"]
    assert on_policy["saved/head_rows"] == tokens - rows
    assert off_policy["saved/head_rows"] == 3 * (tokens - rows)
    assert on_policy["balance/flops_max_over_mean"] == 1.0  # one rank
    assert on_policy["balance/budget_fill"] == pytest.approx(tokens / (100 * on_policy["balance/micro_batches"]))


# --- the console ------------------------------------------------------------------------------------------------------


def display(width: int = 300) -> tuple[Display, io.StringIO]:
    screen, text = Display(10, 0), io.StringIO()
    screen.console = Console(file=text, width=width)
    return screen, text


def test_every_column_of_the_console_is_a_metric_that_steps_report() -> None:
    episodes = [episode([1, 0], experiences=[experience()])]
    reported = rollout_metrics(episodes) | loss_metrics(sums() | {"kind/retrospective/rows": 1.0})
    around = {"optim/grad_norm", "perf/sampled_tokens_per_s", "time/step"}  # those of the learner and of the run
    assert {metric for _, metric, _ in COLUMNS} <= set(reported) | around


def test_a_row_shows_its_numbers_under_the_heading() -> None:
    screen, text = display()
    screen.row(7, {"reward/correct": 0.25, "mel/kept": 3.0})
    heading, row = text.getvalue().splitlines()
    assert heading.split()[:2] == ["step", "right"]
    assert row.split()[:2] == ["7", "0.25"]
    assert row.split()[heading.split().index("kept")] == "3"


def test_names_with_brackets_are_shown_as_they_are() -> None:
    screen, text = display()
    screen.say("runs/[red]x")
    screen.scores(3, {"[bold]math": Score(0.5, 0.25, 1.0)}, 8)
    screen.table("scores", ["set", "Pass@1"], [["[italic]amc", "1"]])
    for name in ("runs/[red]x", "[bold]math 0.500 / 0.250 / 1.000", "[italic]amc"):
        assert name in text.getvalue()
