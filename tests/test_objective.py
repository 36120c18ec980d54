"""Episodes -> samples: advantages by hand, weights, denominators, and what may be dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from factories import as_any, episode, experience, trajectory
from hypothesis import given
from hypothesis import strategies as st
from mel_kernels import LossConfig, Stream
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from mel_fast.experience import MelConfig
from mel_fast.gspo import SequenceLoss
from mel_fast.internalise import Internalise
from mel_fast.objective import Batch, ObjectiveConfig, build_batch, group_advantages, shaped_reward
from mel_fast.prompts import Renderer
from mel_fast.templates import PromptConfig
from mel_fast.types import Episode, Sample

LIMIT = 10  # max_new_tokens


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, PromptConfig(chat=False))


def objective(**settings: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**settings)


def batch(
    episodes: Sequence[Episode],
    config: ObjectiveConfig | None = None,
    internalise: Internalise | None = None,
    nll_weight: float = 1.0,
    renderer: Renderer | None = None,
) -> Batch:
    """Renders nothing unless a renderer is given."""
    config, internalise = config or objective(), internalise or Internalise(**as_any({}))
    return build_batch(episodes, config, internalise, nll_weight, LIMIT, 0.7, as_any(renderer))


def policy(samples: Sequence[Sample]) -> list[Sample]:
    return [s for s in samples if s.kind == "policy"]


def total(samples: Sequence[Sample]) -> float:
    return float(sum(s.weight.sum() for s in samples))


# --- advantages -------------------------------------------------------------------------------------------------------

ROOT3 = 3**0.5


@pytest.mark.parametrize(
    ("settings", "rewards", "expected"),
    [
        # mean 1/4, std sqrt(3)/4
        ({}, [[1, 0, 0, 0]], [[ROOT3, -1 / ROOT3, -1 / ROOT3, -1 / ROOT3]]),
        ({}, [[1, 0], [2, 0]], [[1, -1], [1, -1]]),  # each group by itself
        ({"normalise_std": False}, [[1, 0, 0, 0], [2, 0]], [[0.75, -0.25, -0.25, -0.25], [1, -1]]),
        # less the mean of the others
        ({"algorithm": "rloo"}, [[1, 0, 0, 0], [1, 0]], [[1, -1 / 3, -1 / 3, -1 / 3], [1, -1]]),
        # all eight: mean 1/2, std 1/2
        ({"algorithm": "reinforce++"}, [[1, 0, 1, 0], [1, 1, 0, 0]], [[1, -1, 1, -1], [1, 1, -1, -1]]),
        ({"algorithm": "reinforce++"}, [[1, 1], [0, 0]], [[1, 1], [-1, -1]]),
        # group baseline first: [1/2, -1/2], [0, 0] -> std sqrt(1/8)
        (
            {"algorithm": "reinforce++", "group_baseline": True},
            [[1, 0], [1, 1]],
            [[2**0.5, -(2**0.5)], [0, 0]],
        ),
        ({"algorithm": "rft"}, [[1, 0]], [[0, 0]]),
    ],
)
def test_advantages_are_those_worked_out_by_hand(
    settings: dict[str, Any], rewards: list[list[float]], expected: list[list[float]]
) -> None:
    found = group_advantages(rewards, objective(**settings))
    for group, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(group, wanted, rtol=1e-5, atol=1e-12)


ALGORITHMS = [
    {"algorithm": "grpo"},
    {"algorithm": "grpo", "normalise_std": False},
    {"algorithm": "rloo"},
    {"algorithm": "reinforce++", "group_baseline": True},
    {"algorithm": "rft"},
]


@pytest.mark.parametrize("settings", ALGORITHMS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7])
def test_an_all_equal_group_and_a_group_of_one_have_exactly_no_advantage(
    settings: dict[str, Any], reward: float
) -> None:
    """0.1 three times has a mean of 0.10000000000000002."""
    equal, single, _ = group_advantages([[reward] * 3, [reward], [1.0, 0.0]], objective(**settings))
    assert not equal.any()
    assert not single.any()


def test_a_batch_of_equal_rewards_has_exactly_no_advantage_under_reinforce() -> None:
    found = group_advantages([[0.1] * 3, [0.1] * 4], objective(algorithm="reinforce++"))
    assert not np.concatenate(found).any()


@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=6), min_size=1, max_size=4), st.sampled_from(ALGORITHMS)
)
def test_advantages_are_finite_and_sum_to_zero_over_each_group(
    rewards: list[list[float]], settings: dict[str, Any]
) -> None:
    for group in group_advantages(rewards, objective(**settings)):
        assert np.isfinite(group).all()
        assert abs(group.sum()) < 1e-6


# --- the surrogate's samples ------------------------------------------------------------------------------------------


def test_a_sample_holds_the_prompt_as_context_and_the_response_as_target() -> None:
    (right, wrong) = batch([episode([1, 0], [3, 2])]).updates[0]
    assert right.ids.tolist() == [1, 2, 3, 10, 11, 12]
    assert right.stream.tolist() == [Stream.NONE] * 3 + [Stream.POLICY] * 3
    np.testing.assert_allclose(right.advantage, [0, 0, 0, 1, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(wrong.advantage, [0, 0, 0, -1, -1], rtol=1e-5)
    np.testing.assert_allclose(right.rollout_logp, [0, 0, 0, -0.125, -0.25, -0.375])
    assert right.temperature == 0.7


def test_weights_of_sequence_mean() -> None:
    """1 / (prompts * G * |y|)."""
    samples = policy(batch([episode([1, 0], [3, 2]), episode([1, 0], [4, 1])]).updates[0])
    assert [s.weight[-1] for s in samples] == pytest.approx([1 / 12, 1 / 8, 1 / 16, 1 / 4])
    assert total(samples) == pytest.approx(1.0)


def test_weights_of_token_mean() -> None:
    samples = policy(
        batch([episode([1, 0], [3, 2]), episode([1, 0], [4, 1])], objective(aggregation="token")).updates[0]
    )
    assert [s.weight[-1] for s in samples] == pytest.approx([1 / 10] * 4)


def test_weights_of_a_constant_denominator() -> None:
    """1 / (prompts * G * max_new_tokens)."""
    episodes = [episode([1, 0], [3, 2]), episode([1, 0], [4, 1])]
    samples = policy(batch(episodes, objective(aggregation="constant")).updates[0])
    assert [s.weight[-1] for s in samples] == pytest.approx([1 / 40] * 4)


@pytest.mark.parametrize(("aggregation", "share"), [("sequence", 1 / 2), ("token", 5 / 15), ("constant", 5 / 40)])
def test_a_group_without_signal_is_dropped_but_counts_in_the_denominator(aggregation: str, share: float) -> None:
    found = batch([episode([1, 0], [3, 2]), episode([1, 1], [4, 6])], objective(aggregation=aggregation))
    (samples,) = found.updates
    assert [len(s.ids) for s in samples] == [6, 5]
    assert total(samples) == pytest.approx(share)
    assert found.metrics["batch/groups"] == 2
    assert found.metrics["batch/groups_without_signal"] == 1
    assert found.metrics["batch/policy_tokens"] == 15
    assert found.metrics["batch/policy_tokens_dropped"] == 10
    assert found.metrics["batch/samples"] == 2
    assert found.metrics["batch/tokens"] == 11


@pytest.mark.parametrize("coefficient", ["kl_coef", "entropy_coef"])
def test_rows_without_advantage_stay_when_something_else_moves_them(coefficient: str) -> None:
    samples = batch([episode([1, 1], [4, 6])], objective(**{coefficient: 0.01})).updates[0]
    assert total(samples) == pytest.approx(1.0)
    assert all(not s.advantage.any() for s in samples)


def test_a_group_without_signal_keeps_its_meta_experiences() -> None:
    samples = batch([episode([1, 1], experiences=[experience()]), episode([1, 0])]).updates[0]
    assert [s.kind for s in samples] == ["policy", "policy", "retrospective"]
    assert total([samples[-1]]) == pytest.approx(1.0)


def test_nothing_to_learn_gives_an_empty_update() -> None:
    found = batch([episode([0, 0]), episode([1, 1])])
    assert found.updates == [[]]
    assert found.metrics["batch/samples"] == 0


def test_a_batch_is_cut_into_mini_batches_with_denominators_of_their_own() -> None:
    episodes = [
        episode([1, 0], [3, 2], [experience(memo=3)]),
        episode([1, 0], [4, 1], [experience(memo=5), experience(memo=2)]),
        episode([1, 1], [9, 9]),
    ]
    first, second, third = batch(episodes, objective(updates_per_batch=3, aggregation="token")).updates
    assert [s.weight[-1] for s in policy(first)] == pytest.approx([1 / 5] * 2)
    assert [s.weight[-1] for s in policy(second)] == pytest.approx([1 / 5] * 2)
    assert third == []
    for update in (first, second):
        assert total([s for s in update if s.kind == "retrospective"]) == pytest.approx(1.0)


def test_mini_batches_take_every_group_once_and_advantages_over_all() -> None:
    episodes = [episode([1, 1], id="right"), episode([0, 0], id="wrong"), episode([1, 0], id="mixed")]
    updates = batch(episodes, objective(algorithm="reinforce++", updates_per_batch=2)).updates
    assert [len(update) for update in updates] == [2, 4]  # by itself each all-equal group would have no signal
    assert len(batch(episodes, objective(updates_per_batch=9)).updates) == 3  # no more than there are groups


# --- overlong responses -----------------------------------------------------------------------------------------------


def cut_off(rewards: Sequence[float]) -> Episode:
    """A group whose last response was cut off at the limit."""
    group = episode(rewards, [2] * (len(rewards) - 1) + [LIMIT])
    group.trajectories[-1].finish_reason = "length"
    return group


def test_a_masked_response_is_dropped_but_counts_in_the_denominator() -> None:
    kept, masked = (batch([cut_off([1, 0])], objective(overlong=mode)) for mode in ("keep", "mask"))
    assert total(policy(kept.updates[0])) == pytest.approx(1.0)
    assert [len(s.ids) for s in masked.updates[0]] == [5]
    assert total(masked.updates[0]) == pytest.approx(0.5)
    np.testing.assert_allclose(masked.updates[0][0].advantage[-2:], 1, rtol=1e-5)  # the group's mean still counts it
    assert masked.metrics["batch/masked_overlong"] == 1
    assert kept.metrics["batch/masked_overlong"] == 0


def test_a_masked_response_counts_in_the_token_mean() -> None:
    (sample,) = batch([cut_off([1, 0])], objective(overlong="mask", aggregation="token")).updates[0]
    assert sample.weight[-1] == pytest.approx(1 / (2 + LIMIT))


def test_a_penalty_separates_equal_rewards() -> None:
    assert batch([cut_off([0, 0])], objective(overlong="keep")).updates == [[]]
    short, long = batch([cut_off([0, 0])], objective(overlong="penalise")).updates[0]
    assert short.advantage[-1] > 0 > long.advantage[-1]


@pytest.mark.parametrize(
    ("length", "finish", "buffer", "expected"),
    [
        (6, "stop", 4, 1.0),
        (7, "stop", 4, 0.875),  # one token into the buffer of four
        (10, "stop", 4, 0.5),
        (10, "length", 4, 0.5),
        (10, "stop", 0, 1.0),
        (10, "length", 0, 0.5),
        (3, "length", 4, 0.5),
    ],
)
def test_the_penalty_grows_over_the_buffer(length: int, finish: Any, buffer: int, expected: float) -> None:
    config = objective(overlong="penalise", overlong_penalty=0.5, overlong_buffer=buffer)
    assert shaped_reward(trajectory(1.0, length, finish=finish), config, LIMIT) == pytest.approx(expected)
    assert shaped_reward(trajectory(1.0, length, finish=finish), objective(), LIMIT) == 1.0


# --- rejection-sampling fine-tuning -----------------------------------------------------------------------------------


def test_rft_is_the_nll_of_the_right_responses() -> None:
    samples = batch([episode([1, 0], [3, 2]), episode([1, 1], [4, 5])], objective(algorithm="rft")).updates[0]
    assert [s.kind for s in samples] == ["rft"] * 3
    assert [s.ids[-1] for s in samples] == [12, 13, 24]
    assert [s.weight[-1] for s in samples] == pytest.approx([1 / 9, 1 / 12, 1 / 15])
    assert all((s.stream[3:] == Stream.NLL).all() and not s.stream[:3].any() for s in samples)


def test_rft_without_a_right_response_has_nothing_to_learn() -> None:
    assert batch([episode([0, 0])], objective(algorithm="rft")).updates == [[]]


# --- meta-experience --------------------------------------------------------------------------------------------------


def test_only_kept_experiences_are_learnt() -> None:
    samples = batch([episode([1, 0], experiences=[experience(kept=False), experience(memo=3)])]).updates[0]
    assert [len(s.ids) for s in samples if s.kind == "retrospective"] == [7]


def test_nll_weights_sum_to_coefficient_times_weight_for_each_form(renderer: Renderer) -> None:
    internalise = Internalise(retrospective=1.0, heuristic=0.5, replay=0.25)
    episodes = [episode([1, 0], experiences=[experience(memo=3), experience(memo=8)]), episode([1, 0])]
    samples = batch(episodes, internalise=internalise, nll_weight=0.2, renderer=renderer).updates[0]
    for kind, expected in (("retrospective", 0.2), ("heuristic", 0.1), ("replay", 0.05)):
        assert total([s for s in samples if s.kind == kind]) == pytest.approx(expected)
    short, long = (s for s in samples if s.kind == "retrospective")  # mean over experiences of the mean over tokens
    assert (short.weight[-1], long.weight[-1]) == pytest.approx((0.1 / 3, 0.1 / 8))
    assert total(policy(samples)) == pytest.approx(1.0)  # not diluted by the other stream


def test_each_form_has_its_own_context_and_loss_on_the_target_alone(renderer: Renderer) -> None:
    kept = experience(memo=3)
    group = episode([1, 0], experiences=[kept])
    internalise = Internalise(retrospective=1.0, heuristic=1.0, replay=1.0)
    samples = {s.kind: s for s in batch([group], internalise=internalise, renderer=renderer).updates[0]}
    assert kept.replay is not None
    assert kept.meta is not None
    expected = {
        "retrospective": (kept.reflection.prompt_ids, kept.reflection.output_ids),
        "heuristic": (renderer.recall(group.prompt), renderer.answer(kept.meta.heuristics)),
        "replay": (renderer.solve(group.prompt), kept.replay.output_ids),
    }
    for kind, (context, target) in expected.items():
        sample = samples[kind]
        assert sample.ids.tolist() == [*context, *target]
        assert sample.stream.tolist() == [Stream.NONE] * len(context) + [Stream.NLL] * len(target)
        assert not sample.weight[: len(context)].any()
        assert sample.temperature == 1.0


def test_a_replay_that_failed_or_is_empty_is_never_distilled(renderer: Renderer) -> None:
    """Without validation an experience may be kept whose replay went wrong."""
    internalise = Internalise(retrospective=0.0, replay=1.0)
    experiences = [
        experience(replay=trajectory(0.0, 4)),
        experience(replay=trajectory(1.0, 0)),
        experience(replay=trajectory(1.0, 6)),
    ]
    found = batch([episode([1, 1], experiences=experiences)], internalise=internalise, renderer=renderer)
    ((sample,),) = found.updates
    assert total([sample]) == pytest.approx(1.0)
    assert (sample.stream == Stream.NLL).sum() == 6
    assert found.metrics["batch/forms_dropped"] == 2


def test_a_weight_of_zero_builds_no_sample() -> None:
    group = [episode([1, 0], experiences=[experience()])]
    assert {s.kind for s in batch(group, nll_weight=0.0).updates[0]} == {"policy"}
    none = Internalise(retrospective=0.0)
    assert {s.kind for s in batch(group, internalise=none).updates[0]} == {"policy"}


def test_the_nll_weight_warms_up() -> None:
    config = MelConfig(**as_any({"nll_weight": 0.5, "nll_warmup_steps": 4}))
    assert [config.nll_weight_at(step) for step in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert MelConfig(**as_any({"nll_weight": 0.5})).nll_weight_at(0) == 0.5
    assert MelConfig(**as_any({"enabled": False})).nll_weight_at(9) == 0.0


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"clip_low": 1.5}, {"clip_high": float("inf")}, {"dual_clip": 1.0}, {"kl_coef": -1}, {"tis_cap": float("inf")}],
)
def test_settings_that_the_loss_would_refuse_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        objective(**settings)


def test_the_loss_gets_the_settings() -> None:
    loss = objective(clip_low=0.1, clip_high=0.28, dual_clip=3, kl_coef=0.5, entropy_coef=0.25, tis_cap=2).loss
    expected = LossConfig(clip_low=0.1, clip_high=0.28, dual_clip=3, kl_coef=0.5, entropy_coef=0.25, tis_cap=2)
    assert loss == expected


def test_gspo_refuses_what_its_sequence_ratio_cannot_have() -> None:
    assert objective(algorithm="gspo", clip_low=3e-4, clip_high=4e-4).loss == SequenceLoss(3e-4, 4e-4)
    with pytest.raises(ValidationError, match="gspo has no dual_clip"):
        objective(algorithm="gspo", dual_clip=3)
