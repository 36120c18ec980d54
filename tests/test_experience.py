"""Contrast -> reflect -> replay -> keep, against an engine that answers by a script."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from factories import MEMO, ScriptedEngine, as_any, make_prompt, word_verifier
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mel_fast.experience import Collector, MelConfig, contrast_pairs, seed_of
from mel_fast.prompts import Renderer
from mel_fast.rollout.engine import RolloutConfig
from mel_fast.templates import PromptConfig
from mel_fast.types import Episode, Prompt, Request

PROMPTS = PromptConfig(
    solve="SOLVE {question}",
    reflect="REFLECT {question} ONE {wrong} TWO {right}",
    replay="REPLAY {experience} ON {question}",
    recall="RECALL {question}",
    critique="CRITIQUE {question} ONE {wrong}",
    chat=False,
)
Answer = Callable[[str, Request, int], str]


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, PROMPTS)


def script(
    group: str, memos: tuple[str, ...] = (MEMO,), replays: tuple[str, ...] = ("right",), long: int = 0
) -> Answer:
    """`group`: what the rollouts are in turn, (w)rong or (r)ight; `memos` and `replays`: in turn."""
    solutions = {"w": "this is bad " + "x" * long, "r": "this is right"}

    def answer(prompt: str, request: Request, before: int) -> str:
        if prompt.startswith("SOLVE"):
            return solutions[group[before % len(group)]]
        if prompt.startswith(("REFLECT", "CRITIQUE")):
            return memos[before % len(memos)]
        return replays[before % len(replays)]

    return answer


def collect(
    renderer: Renderer,
    answer: Answer,
    prompts: list[Prompt] | None = None,
    step: int = 3,
    context_length: int = 100_000,
    max_new_tokens: int = 50,
    seed: int = 0,
    group_size: int = 4,
    **mel: Any,
) -> tuple[list[Episode], ScriptedEngine]:
    engine = ScriptedEngine(renderer, answer, context_length)
    rollout = RolloutConfig.model_validate(
        {"group_size": group_size, "max_new_tokens": max_new_tokens, "temperature": 0.9}
    )
    collector = Collector(engine, renderer, word_verifier(), rollout, MelConfig(**as_any(mel)), seed)
    return asyncio.run(collector.collect(prompts or [make_prompt()], step)), engine


# --- what happens, in which order -------------------------------------------------------------------------------------


def test_a_mixed_group_is_contrasted_reflected_on_and_replayed(renderer: Renderer) -> None:
    (episode,), engine = collect(renderer, script("wr"), pairs_per_prompt=1)
    assert engine.prompts() == [
        *["SOLVE What is it?"] * 4,
        "REFLECT What is it? ONE this is bad  TWO this is right",
        f"REPLAY {MEMO} ON What is it?",
    ]
    assert episode.step == 3
    assert [t.correct for t in episode.trajectories] == [False, True, False, True]
    assert [t.reward for t in episode.trajectories] == [0.0, 1.0, 0.0, 1.0]
    assert [t.reason for t in episode.trajectories] == ["no answer", "", "no answer", ""]
    (found,) = episode.experiences
    assert (found.wrong, found.right, found.kept) == (0, 1, True)
    assert found.meta is not None
    assert found.meta.heuristics == "When terms cancel, check signs."
    assert found.reflection.text == MEMO
    assert found.replay is not None
    assert found.replay.correct


def test_trajectories_hold_what_was_asked_and_answered(renderer: Renderer) -> None:
    (episode,), engine = collect(renderer, script("w"))
    for request, found in zip(engine.asked, episode.trajectories, strict=True):
        assert found.prompt_ids == request.prompt_ids
        assert len(found.logprobs) == len(found.output_ids)
        assert found.finish_reason == "stop"


def test_one_episode_per_prompt_in_order_each_in_a_session_of_its_own(renderer: Renderer) -> None:
    prompts = [make_prompt(f"p{i}", f"Question {i}?") for i in range(5)]
    episodes, engine = collect(renderer, script("wr"), prompts)
    assert [e.prompt for e in episodes] == prompts
    assert sorted(engine.keys) == [p.id for p in prompts]


def test_a_critique_without_contrast_sees_the_wrong_solution_alone(renderer: Renderer) -> None:
    (episode,), engine = collect(renderer, script("wr"), pairs_per_prompt=1, reflect_on="wrong")
    assert engine.prompts()[4] == "CRITIQUE What is it? ONE this is bad "
    assert [(x.wrong, x.right, x.kept) for x in episode.experiences] == [(0, 1, True)]


@pytest.mark.parametrize("form", ["right", "opening"])
def test_what_is_learnt_without_reflection_is_sampled_without(renderer: Renderer, form: str) -> None:
    (episode,), engine = collect(renderer, script("wr"), internalise={"retrospective": 0, form: 1})
    assert (episode.experiences, len(engine.asked)) == ([], 4)


@pytest.mark.parametrize("group", ["w", "r"])
def test_a_group_that_is_all_wrong_or_all_right_has_no_contrast(renderer: Renderer, group: str) -> None:
    (episode,), engine = collect(renderer, script(group))
    assert episode.experiences == []
    assert len(engine.asked) == 4


def test_without_meta_experience_only_rollouts_are_sampled(renderer: Renderer) -> None:
    (episode,), engine = collect(renderer, script("wr"), enabled=False)
    assert episode.experiences == []
    assert len(engine.asked) == 4


@pytest.mark.parametrize(("wanted", "found"), [(1, 1), (2, 2), (3, 3), (4, 4), (9, 4)])
def test_no_more_pairs_than_the_setting_and_than_there_are(renderer: Renderer, wanted: int, found: int) -> None:
    (episode,), _ = collect(renderer, script("wr"), pairs_per_prompt=wanted)  # 2 wrong, 2 right
    pairs = [(x.wrong, x.right) for x in episode.experiences]
    assert len(set(pairs)) == len(pairs) == found
    assert all(not episode.trajectories[w].correct and episode.trajectories[r].correct for w, r in pairs)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_malformed_reflection_is_counted_and_not_replayed(renderer: Renderer) -> None:
    (episode,), engine = collect(renderer, script("wr", ("Critique: hm",)), pairs_per_prompt=1)
    (found,) = episode.experiences
    assert (found.meta, found.malformed, found.replay, found.kept) == (None, "no bifurcation", None, False)
    assert not any(p.startswith("REPLAY") for p in engine.prompts())


def test_a_reflection_that_leaks_the_answer_is_malformed(renderer: Renderer) -> None:
    (episode,), _ = collect(renderer, script("wr", (MEMO + " Get 73.",)), pairs_per_prompt=1)
    assert [x.malformed for x in episode.experiences] == ["leaks answer"]


def test_a_reflection_cut_off_at_its_limit_is_malformed_even_if_all_sections_are_there(renderer: Renderer) -> None:
    (episode,), engine = collect(renderer, script("wr", (MEMO + "...",)), pairs_per_prompt=1)
    (found,) = episode.experiences
    assert (found.meta, found.malformed, found.kept) == (None, "truncated", False)
    assert len(engine.asked) == 5


def test_an_experience_whose_replay_fails_is_not_kept(renderer: Renderer) -> None:
    (episode,), _ = collect(renderer, script("wr", replays=("bad",)), pairs_per_prompt=1)
    (found,) = episode.experiences
    assert found.replay is not None
    assert (found.replay.correct, found.kept) == (False, False)
    assert found.meta is not None  # well-formed all the same


def test_verdicts_meet_their_own_experiences(renderer: Renderer) -> None:
    """Several memos of one group, of which one is malformed and one is of no help."""

    def answer(prompt: str, request: Request, before: int) -> str:
        if prompt.startswith("SOLVE"):
            return ["bad one", "bad two", "bad three", "right"][before]
        word = next(w for w in ("one", "two", "three") if w in prompt)
        if prompt.startswith(("REFLECT", "CRITIQUE")):
            return "nonsense" if word == "one" else MEMO.replace("rushed", f"rushed {word}")
        return "bad" if word == "two" else "right"

    (episode,), _ = collect(renderer, answer, pairs_per_prompt=3)
    verdicts = {episode.trajectories[x.wrong].text: (x.malformed, x.kept) for x in episode.experiences}
    assert verdicts == {"bad one": ("no bifurcation", False), "bad two": ("", False), "bad three": ("", True)}


def test_without_validation_a_failed_replay_does_not_matter(renderer: Renderer) -> None:
    answer = script("wr", replays=("bad",))
    (episode,), _ = collect(renderer, answer, pairs_per_prompt=1, validate_by_replay=False)
    (found,) = episode.experiences
    assert found.kept
    (episode,), _ = collect(renderer, script("wr", ("nonsense",)), pairs_per_prompt=1, validate_by_replay=False)
    assert not episode.experiences[0].kept


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_contrast_beyond_the_context_is_dropped_and_counted(renderer: Renderer) -> None:
    answer = script("wr", long=300)
    (episode,), engine = collect(renderer, answer, context_length=200)
    assert episode.experiences == []
    assert episode.dropped == {"reflection_beyond_context": 2}
    assert len(engine.asked) == 4


def test_a_replay_beyond_the_context_is_dropped_and_counted(renderer: Renderer) -> None:
    answer = script("wr", (MEMO + "x" * 400,))
    (episode,), _ = collect(renderer, answer, context_length=300, pairs_per_prompt=1)
    (found,) = episode.experiences
    assert (found.replay, found.kept) == (None, False)
    assert episode.dropped == {"replay_beyond_context": 1}


def test_no_request_exceeds_the_context(renderer: Renderer) -> None:
    lengths = [len(r.prompt_ids) for r in collect(renderer, script("wr"))[1].asked]
    limit = max(lengths) + 50  # prompt and response fit exactly
    (episode,), engine = collect(renderer, script("wr"), context_length=limit)
    assert [len(r.prompt_ids) for r in engine.asked] == lengths
    assert not episode.dropped
    (episode,), engine = collect(renderer, script("wr"), context_length=limit - 1)
    assert all(len(r.prompt_ids) + r.max_new_tokens <= limit - 1 for r in engine.asked)
    assert episode.dropped


def test_each_purpose_has_its_temperature_and_the_limit(renderer: Renderer) -> None:
    _, engine = collect(renderer, script("wr"), pairs_per_prompt=1, reflection_temperature=0.5, replay_temperature=0.3)
    assert [r.temperature for r in engine.asked] == [0.9] * 4 + [0.5, 0.3]
    assert {r.max_new_tokens for r in engine.asked} == {50}


# --- seeds ------------------------------------------------------------------------------------------------------------


def seeds(renderer: Renderer, step: int = 0, seed: int = 0) -> list[int]:
    prompts = [make_prompt("a", "A?"), make_prompt("b", "B?")]
    return sorted(r.seed for r in collect(renderer, script("wr"), prompts, step=step, seed=seed)[1].asked)


def test_every_sample_of_every_step_and_run_has_a_seed_of_its_own(renderer: Renderer) -> None:
    one, later, other = seeds(renderer), seeds(renderer, step=1), seeds(renderer, seed=1)
    assert len(set(one + later + other)) == len(one + later + other) == 48


def test_repetition_repeats_the_seeds(renderer: Renderer) -> None:
    assert seeds(renderer) == seeds(renderer)


def test_a_prompt_that_a_step_has_twice_is_sampled_anew(renderer: Renderer) -> None:
    prompt = make_prompt("a", "A?")
    once, twice = (
        [r.seed for r in collect(renderer, script("wr"), [prompt] * count)[1].asked if r.temperature == 0.9]
        for count in (1, 2)
    )
    assert twice[:4] == once
    assert len(set(twice)) == 8


def test_a_seed_fits_a_generator_and_separates_its_parts() -> None:
    assert 0 <= seed_of(0, "a") < 2**63
    assert len({seed_of(1, 23), seed_of(12, 3), seed_of(1, 2, 3), seed_of("123")}) == 4


# --- the choice of pairs ----------------------------------------------------------------------------------------------


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 70), st.randoms(use_true_random=False))
def test_pairs_cover_both_sides_evenly_and_never_repeat(wrongs: int, rights: int, count: int, random: Any) -> None:
    indices = list(range(wrongs + rights))
    random.shuffle(indices)
    wrong, right = indices[:wrongs], indices[wrongs:]
    lengths = [random.randint(1, 9) for _ in indices]
    pairs = contrast_pairs(wrong, right, lengths, count)
    assert len(set(pairs)) == len(pairs) == min(count, wrongs * rights)
    if not pairs:
        return
    for place, side in ((0, wrong), (1, right)):
        uses = Counter(pair[place] for pair in pairs)
        assert set(uses) <= set(side)
        assert max(uses.values()) - min(uses[i] for i in side) <= 1
    order = [w for w, _ in pairs]
    assert len([i for i in range(1, len(order)) if order[i] != order[i - 1]]) == len(set(order)) - 1  # stand together


def test_longer_wrong_and_shorter_right_solutions_come_first() -> None:
    assert contrast_pairs([0, 1], [2, 3], [5, 9, 7, 4], 1) == [(1, 3)]
