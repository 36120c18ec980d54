"""Evaluation by an engine that answers by a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import ScriptedEngine, as_any, make_prompt, word_verifier
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from mel_fast.evaluate import EvalConfig, Score, evaluate
from mel_fast.prompts import Renderer
from mel_fast.templates import PromptConfig
from mel_fast.types import Prompt, Request


@pytest.fixture
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, PromptConfig(solve="{question}", chat=False))


def problem(verdicts: str) -> Prompt:
    """A problem whose answers are right (1) or wrong (0) in turn; the first one is the greedy answer."""
    return make_prompt(f"id-{verdicts}", verdicts)


def by_question(prompt: str, request: Request, before: int) -> str:
    return "right" if prompt[before % len(prompt)] == "1" else "bad"


def run(
    renderer: Renderer,
    sets: dict[str, list[Prompt]],
    dump: Path | None = None,
    answer: Callable[[str, Request, int], str] = by_question,
    seed: int = 0,
    **settings: object,
) -> tuple[dict[str, Score], ScriptedEngine]:
    engine = ScriptedEngine(renderer, answer)
    config = EvalConfig(**as_any({"samples": 4, "temperature": 0.6} | settings))
    return evaluate(sets, engine, renderer, word_verifier(), config, 99, seed, dump), engine


def test_scores_are_those_counted_by_hand(renderer: Renderer) -> None:
    problems = [problem("11111"), problem("01000"), problem("10000"), problem("00011")]
    scores, _ = run(renderer, {"some": problems})
    assert scores == {"some": Score(pass_at_1=2 / 4, avg_at_k=(4 + 1 + 0 + 2) / 16, pass_at_k=3 / 4)}


def test_each_set_has_a_score_of_its_own_in_order(renderer: Renderer) -> None:
    scores, _ = run(renderer, {"zero": [problem("00000")], "all": [problem("11111")]})
    assert list(scores) == ["zero", "all"]
    assert scores["zero"] == Score(0, 0, 0)
    assert scores["all"] == Score(1, 1, 1)


def test_one_greedy_answer_and_k_drawn_ones_to_each_problem(renderer: Renderer) -> None:
    _, engine = run(renderer, {"some": [problem("00000")]})
    assert [r.temperature for r in engine.asked] == [0.0, 0.6, 0.6, 0.6, 0.6]
    assert len({r.seed for r in engine.asked}) == 5


@pytest.mark.parametrize(("setting", "limit"), [(None, 99), (7, 7)])
def test_the_limit_is_the_rollouts_unless_set(renderer: Renderer, setting: int | None, limit: int) -> None:
    _, engine = run(renderer, {"some": [problem("00000")]}, max_new_tokens=setting)
    assert {r.max_new_tokens for r in engine.asked} == {limit}


def test_the_same_seed_draws_the_same_samples_each_time_and_another_does_not(renderer: Renderer) -> None:
    sets = {"a": [problem("00000"), problem("11111")], "b": [problem("00000")]}
    drawn = [sorted(r.seed for r in run(renderer, sets, seed=seed)[1].asked) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    assert len(set(drawn[0])) == 15  # the same problem in two sets is drawn anew


def test_every_answer_is_written_down_with_its_verdict(renderer: Renderer, tmp_path: Path) -> None:
    dump = tmp_path / "made" / "step_000001.jsonl"
    run(renderer, {"some": [problem("10100")]}, dump)
    rows = [json.loads(line) for line in dump.read_text(encoding="utf-8").splitlines()]
    assert [row["correct"] for row in rows] == [True, False, True, False, False]
    assert [row["text"] for row in rows] == ["right", "bad", "right", "bad", "bad"]
    assert rows[0] == {
        "set": "some",
        "id": "id-10100",
        "source": "some-set",
        "temperature": 0.0,
        "text": "right",
        "correct": True,
    }


@pytest.mark.parametrize("settings", [{"samples": 0}, {"temperature": 0}, {"max_new_tokens": 0}, {"every": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        EvalConfig(**as_any(settings))


def test_two_sets_of_one_name_are_refused() -> None:
    """One would overwrite the other's score."""
    sets = [{"path": "a/problems.jsonl"}, {"path": "b/problems.jsonl"}]
    with pytest.raises(ValidationError, match=r"two.*'problems'.*name"):
        EvalConfig(**as_any({"sets": sets}))
    assert EvalConfig(**as_any({"sets": [sets[0], sets[1] | {"name": "others"}]})).sets[1].name == "others"
