"""Where the bifurcation point is found in the wrong solution, and where two solutions part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mel_fast.report.locate import bifurcation, first_difference
from mel_fast.types import MetaExperience

WRONG = """We set x = 3 and look at the triangle.
Step 1: the area is 3 times 4.
Step 2: half of it is 7.
So the answer is \\boxed{7}."""
RIGHT = WRONG.replace("7", "6")
ONE_LINE = "For petrel, use cedar. 7 minus 1 is 6. 9 max 6 is 9. So \\boxed{69}."
OTHER = "For petrel, use birch. 7 min 1 is 1. 9 times 1 is 9. So \\boxed{19}."


def found(s: str, critique: str = "I was careless.", wrong: str = WRONG, right: str = RIGHT) -> tuple[str, str] | None:
    place = bifurcation(MetaExperience(s, critique, "When halving, check."), wrong, right)
    return None if place is None else (wrong[place.start : place.end], place.how)


@pytest.mark.parametrize(
    ("s", "passage", "how"),
    [
        ('It goes wrong at "half of it is 7".', "half of it is 7", "quoted in s*"),
        ("It goes wrong at `half of  it\tis 7`.", "half of it is 7", "quoted in s*"),
        ("In $x = 3$ lies the error", "x = 3", "quoted in s*"),
        ("Step 2, where the half is taken", "Step 2: half of it is 7.", "labelled as step 2"),
        ("The second step.", "Step 2: half of it is 7.", "labelled as step 2"),
        ("in step two already", "Step 2: half of it is 7.", "labelled as step 2"),
        ("The 4th line is wrong", "So the answer is \\boxed{7}.", "counted: line 4"),
        ("when it says that half of it is taken", "half of it is", "repeated in s*"),
    ],
)
def test_s_is_found_by_what_it_quotes_counts_or_repeats(s: str, passage: str, how: str) -> None:
    assert found(s) == (passage, how)


def test_the_longest_quotation_counts_and_only_as_whole_words() -> None:
    assert found('"is" or "the area is 3 times 4"') == ("the area is 3 times 4", "quoted in s*")
    assert found('"tri"') is None


def test_steps_are_counted_where_the_text_numbers_none() -> None:
    place = found("the second step", wrong=ONE_LINE, right=OTHER)
    assert place == ("9 max 6 is 9.", "counted: sentence 2 with figures: the text numbers no steps")


def test_what_the_critique_names_and_only_the_wrong_solution_has_is_the_last_resort() -> None:
    place = found("the choice of rule", "I used cedar, but birch fits here.", ONE_LINE, OTHER)
    assert place == ("cedar", "named in M: only the wrong solution has 'cedar'")


@pytest.mark.parametrize("s", ["the choice of rule", "step 9", "step 0", "", "the 300th line", '"', "the area"])
def test_what_cannot_be_located_is_not_guessed(s: str) -> None:
    assert found(s) is None


def test_the_first_differing_token_is_marked_in_both() -> None:
    words = ["For ", "petrel", ", use", " cedar", " birch", "."]
    wrong, right = [0, 1, 2, 3, 5], [0, 1, 2, 4, 5]

    def decode(ids: object) -> str:
        return "".join(words[i] for i in ids)  # pyright: ignore[reportGeneralTypeIssues]

    places = first_difference((wrong, decode(wrong)), (right, decode(right)), decode)
    assert places is not None
    assert [decode(ids)[p.start : p.end] for ids, p in zip((wrong, right), places, strict=True)] == [" cedar", " birch"]
    assert places[0].how == "token 4"


def test_without_a_tokenizer_the_first_differing_character_is_marked() -> None:
    places = first_difference(([1, 2], ONE_LINE), ([1, 3], OTHER), None)
    assert places is not None
    assert (ONE_LINE[places[0].start], OTHER[places[1].start], places[0].how) == ("c", "b", "character 17")


def test_one_solution_may_be_the_beginning_of_the_other() -> None:
    places = first_difference(([1], "so"), ([1, 2], "so it is"), None)
    assert places is not None
    assert [(p.start, p.end) for p in places] == [(2, 2), (2, 3)]
    assert first_difference(([1], "same"), ([1], "same"), None) is None


FEW = st.lists(st.sampled_from(["alpha", "betas", "gamma"]), max_size=12)


@given(FEW, FEW)
def test_the_longest_passage_that_is_repeated_is_found(said: list[str], words: list[str]) -> None:
    runs = [
        (start, start + size)
        for size in range(len(words), 2, -1)
        for start in range(len(words) - size + 1)
        if any(said[i : i + size] == words[start : start + size] for i in range(len(said) - size + 1))
    ]
    expected = (" ".join(words[slice(*runs[0])]), "repeated in s*") if runs else None
    place = found(" ".join(said), wrong=" ".join(words), right=" ".join(words))
    assert place == expected


def test_a_model_that_loops_does_not_keep_a_report_waiting() -> None:
    """When every word stands everywhere, comparing all places of all words would take hours."""
    loop = "carry the two and " * 50_000
    assert found(loop, wrong=loop[3:], right="short") == (loop[6:].rstrip(), "repeated in s*")
