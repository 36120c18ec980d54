"""What the viewers are given: advantages as the run's objective has them, token texts, places of marks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from factories import episode, experience, trajectory
from report.synthetic import case, embedded, experiences, groups, make_run, settings, step
from transformers import PreTrainedTokenizerBase

from mel_fast.report import Limits, write_report
from mel_fast.types import Episode


def advantages(tmp_path: Path, episodes: list[Episode], **objective: Any) -> list[tuple[Any, Any]]:
    run = make_run(
        tmp_path / "run", [step(1)], {1: episodes}, settings(**{f"objective__{k}": v for k, v in objective.items()})
    )
    responses = [response for group in groups(write_report(run)) for response in group["responses"]]
    return [(response["advantage"], response["coefficient"]) for response in responses]


def test_advantages_are_those_of_the_runs_objective(tmp_path: Path) -> None:
    assert advantages(tmp_path, [episode([1, 0, 0, 0])], algorithm="rloo") == [(1, 1)] + [(-1 / 3, -1 / 3)] * 3


def test_an_objective_that_normalises_over_the_step_sees_the_whole_step(tmp_path: Path) -> None:
    """Also when only a part of its groups is embedded."""
    config = settings(objective__algorithm="reinforce++")
    run = make_run(tmp_path / "run", [step(1)], {1: [episode([1, 1]), episode([0, 0])]}, config)
    (shown,) = groups(write_report(run, limits=Limits(tokens=8)))
    assert [response["advantage"] for response in shown["responses"]] == pytest.approx([1, 1], abs=1e-4)


def test_a_masked_response_has_no_gradient(tmp_path: Path) -> None:
    made = episode([0, 1])
    made.trajectories[0].finish_reason = "length"
    (masked, other) = advantages(tmp_path, [made], overlong="mask", normalise_std=False)
    assert (masked, other) == ((-0.5, 0.0), (0.5, 0.5))


def test_rft_has_no_advantages_but_learns_the_right_ones(tmp_path: Path) -> None:
    assert advantages(tmp_path, [episode([0, 1])], algorithm="rft") == [(None, 0.0), (None, 1.0)]


@pytest.mark.parametrize(
    ("config", "words"),
    [(None, "does not have the objective's settings"), (settings(objective__algorithm="ppo2"), "objective.algorithm")],
)
def test_without_a_readable_objective_there_are_no_advantages_and_the_page_says_why(
    tmp_path: Path, config: dict[str, Any] | None, words: str
) -> None:
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [episode([0, 1])]}, config))
    assert groups(report)[0]["responses"][0]["advantage"] is None
    assert words in embedded(report)["rollouts"]["notes"][0]


def test_tokens_have_texts_when_the_run_has_a_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = case()
    response = made.trajectories[0]
    response.output_ids = tokenizer.encode("For petrel, use cedar.", add_special_tokens=False)
    response.logprobs = [-0.126] * len(response.output_ids)
    run = make_run(tmp_path / "run", [step(1)], {1: [made]})
    tokenizer.save_pretrained(run / "model")
    report = write_report(run)
    vocabulary = embedded(report)["rollouts"]["vocabularies"][0]
    shown = groups(report)[0]["responses"][0]
    assert "".join(vocabulary["texts"][i] for i in shown["ids"]) == "For petrel, use cedar."
    assert [vocabulary["ids"][i] for i in shown["ids"]] == response.output_ids
    assert set(shown["logp"]) == {-13}  # hundredths of a nat
    assert vocabulary["note"] == ""


def test_without_a_tokenizer_ids_are_shown_and_the_page_says_why(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [case()]}))
    vocabulary = embedded(report)["rollouts"]["vocabularies"][0]
    assert vocabulary["texts"] is None
    assert "no tokenizer in the run's model/ (written at its end) or in /nowhere/model" in vocabulary["note"]


def test_verdicts_tell_kept_failed_malformed_and_unreplayed_apart(tmp_path: Path) -> None:
    found = [experience(kept=True), experience(kept=False), experience(), experience()]
    found[2].meta, found[2].malformed, found[2].kept, found[2].replay = None, "no critique", False, None
    found[3].kept, found[3].replay = False, None
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [episode([0, 1], experiences=found)]}))
    shown = experiences(report)
    assert [(x["status"], x["reason"]) for x in shown] == [
        ("kept", ""),
        ("failed", ""),
        ("malformed", "no critique"),
        ("unreplayed", ""),
    ]
    assert shown[2]["bifurcation"] is None


def test_the_nll_of_m_is_that_of_its_writing(tmp_path: Path) -> None:
    found = experience(memo=4)
    found.reflection.logprobs = [-1.0, -2.0, -3.0, -4.0]
    empty = experience()
    empty.reflection = trajectory(length=0)
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [episode([0, 1], experiences=[found, empty])]}))
    assert embedded(report)["experiences"]["nll"] == [2.5, None]


def test_places_count_as_javascript_counts(tmp_path: Path) -> None:
    made = case(wrong="\U0001d465 is \U0001d466 then 3", right="other", memo=('at "then 3"', "c", "h"))
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [made]}))
    place = experiences(report)[0]["bifurcation"]
    assert (place["start"], place["end"]) == (9, 15)


def test_a_chat_prompt_is_shown_by_its_messages(tmp_path: Path) -> None:
    made = case(question="")
    object.__setattr__(
        made.prompt, "messages", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    )
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [made]}))
    assert experiences(report)[0]["question"] == "Be brief.\n\nWhy?"


def test_numbers_that_json_does_not_have_do_not_break_the_page(tmp_path: Path) -> None:
    made = case()
    made.trajectories[0].logprobs = [-math.inf, math.nan]
    made.trajectories[0].reward = math.nan
    made.experiences[0].reflection.logprobs[0] = math.nan
    report = write_report(make_run(tmp_path / "run", [step(1)], {1: [made]}))
    response = groups(report)[0]["responses"][0]
    assert (response["logp"], response["reward"], response["advantage"]) == ([-10_000, -10_000], None, None)
    assert embedded(report)["experiences"]["nll"] == [None]
