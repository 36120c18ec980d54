"""What of an experience is learnt, in which context: the forms beyond those of the paper, and the controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
from factories import episode, experience, make_prompt, trajectory
from mel_kernels import Stream
from transformers import PreTrainedTokenizerBase

from mel_fast.internalise import Internalise, meta_experience_samples
from mel_fast.prompts import Renderer
from mel_fast.templates import PromptConfig
from mel_fast.types import Episode, Experience, MetaExperience, Sample

MEMO = "Bifurcation: the first step.\nCritique: I used birch.\nHeuristics: When asked about jade, use cedar."


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, PromptConfig(chat=False, opening_end="."))


def written(renderer: Renderer, text: str = MEMO) -> Experience:
    made = experience()
    made.reflection.output_ids, made.reflection.text = renderer.answer(text), text
    made.meta = MetaExperience("the first step.", "I used birch.", text.rpartition("Heuristics: ")[2])
    return made


def made(episodes: list[Episode], renderer: Renderer, **weights: float) -> tuple[list[Sample], int]:
    internalise = Internalise.model_validate({"retrospective": 0.0} | weights)
    return meta_experience_samples(episodes, internalise, 1.0, renderer)


def learnt(episodes: list[Episode], renderer: Renderer, **weights: float) -> list[tuple[str, str, str]]:
    """(kind, context, target) of every sample, as text."""
    return [(s.kind, *parted(s, renderer)) for s in made(episodes, renderer, **weights)[0]]


def parted(sample: Sample, renderer: Renderer) -> tuple[str, str]:
    target = sample.stream == Stream.NLL
    assert ((sample.weight > 0) == target).all()
    return renderer.decode(sample.ids[~target].tolist()), renderer.decode(sample.ids[target].tolist())


def test_the_conclusion_is_the_heuristics_after_the_rest_of_the_reflection(renderer: Renderer) -> None:
    told = written(renderer)
    ((kind, context, target),) = learnt([episode([1, 0], experiences=[told])], renderer, conclusion=1.0)
    assert kind == "conclusion"
    assert context == renderer.decode(told.reflection.prompt_ids) + MEMO.removesuffix(target)
    assert target.strip() == "When asked about jade, use cedar."


def test_the_controls_learn_right_solutions_of_mixed_groups_or_how_they_begin(renderer: Renderer) -> None:
    text = "For jade, use cedar. So it is 3."
    mixed, solved = episode([0, 1]), episode([1, 1])
    mixed.trajectories[1].output_ids = renderer.answer(text)
    question = renderer.decode(mixed.trajectories[1].prompt_ids)
    assert learnt([mixed, solved], renderer, right=1.0) == [("right", question, text)]
    assert learnt([mixed, solved], renderer, opening=1.0) == [("opening", question, "For jade, use cedar.")]


def test_a_solution_without_an_end_of_its_opening_is_opening_throughout(renderer: Renderer) -> None:
    mixed = episode([0, 1])
    mixed.trajectories[1].output_ids = renderer.answer("no stop at all")
    assert [target for _, _, target in learnt([mixed], renderer, opening=1.0)] == ["no stop at all"]


@pytest.mark.parametrize("form", ["retrospective", "heuristic", "conclusion", "replay"])
def test_shuffled_experiences_stand_in_the_place_of_another_prompts(renderer: Renderer, form: str) -> None:
    places = [written(renderer, MEMO.replace("jade", stone)) for stone in ("jade", "opal", "ruby")]
    for index, place in enumerate(places):
        place.replay = trajectory(1.0, 3 + index)
    first = replace(episode([1, 0], experiences=places[:2]), prompt=make_prompt("p1"))
    second = replace(episode([1, 0], experiences=places[2:]), prompt=make_prompt("p2"))
    true, shuffled = (learnt([first, second], renderer, **{form: 1.0}, shuffled=s) for s in (False, True))
    contexts, targets = ([row[column] for row in true] for column in (1, 2))
    if form != "conclusion":  # whose context holds the rest of the experience
        assert [context for _, context, _ in shuffled] == contexts
    assert [target for _, _, target in shuffled] == [targets[2], targets[2], targets[0]]


def test_where_one_prompt_alone_has_experiences_none_is_shuffled_and_all_are_counted(renderer: Renderer) -> None:
    alone = episode([1, 0], experiences=[written(renderer), written(renderer)])
    assert made([alone], renderer, retrospective=1.0, heuristic=0.5, shuffled=True) == ([], 4)
    assert made([alone], renderer, retrospective=1.0, heuristic=0.5)[1] == 0


def test_prompts_of_two_sources_are_others_under_one_id(renderer: Renderer) -> None:
    one = episode([1, 0], experiences=[written(renderer)])
    other = replace(one, prompt=replace(one.prompt, source="another-set", question="Why?"))
    samples, missing = made([one, other], renderer, retrospective=1.0, shuffled=True)
    assert (len(samples), missing) == (2, 0)
