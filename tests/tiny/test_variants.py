"""Worlds in which a reflection says what a solution does not: tacit rules, guilds; and critiques without contrast."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from mel_fast.config import parse_arguments
from mel_fast.prompts import Renderer
from mel_fast.tiny.build import write_data
from mel_fast.tiny.config import WarmStartConfig, WorldConfig
from mel_fast.tiny.demonstrations import _Teacher
from mel_fast.tiny.prepare import tokenizer_of
from mel_fast.tiny.texts import rule_heuristics, solution
from mel_fast.tiny.world import Problem, World

GUILDS = WorldConfig(guilds=True, trained=32)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    _, config = parse_arguments(["--tiny.world.guilds=true", "--tiny.world.trained=32"], "test")
    assert config.tiny is not None
    return Renderer(tokenizer_of(config.tiny, config.prompts), config.prompts)


def test_a_tacit_solution_names_no_rule_but_its_heuristics_do() -> None:
    world = World(WorldConfig(tacit=True))
    problem = Problem(world.topics[0], (1, 2, 3))
    assert not any(rule.name in solution(problem, problem.topic.rule) for rule in world.rules)
    assert problem.topic.rule.name in rule_heuristics(problem.topic, problem.topic.rule)


def test_a_guild_shares_its_belief_and_its_name_in_heuristics() -> None:
    world = World(GUILDS)
    by_guild = {topic.guild: [t for t in world.topics if t.guild == topic.guild] for topic in world.topics}
    assert len(by_guild) == 16
    for guild, topics in by_guild.items():
        assert len(topics) == 8
        assert len({topic.belief for topic in topics}) == 1
        assert {rule_heuristics(topic, topic.rule) for topic in topics} == {
            f"When asked about {guild}, use {topics[0].rule.name}."
        }
    groups = Counter(tuple(sorted({t.group for t in topics})) for topics in by_guild.values())
    assert groups == {("sure",): 4, ("sibling", "trained"): 8, ("untrained",): 4}


def test_siblings_are_evaluated_and_never_trained_on(tmp_path: Path) -> None:
    world = World(GUILDS)
    write_data(world, tmp_path)
    siblings = {topic.name for topic in world.group("sibling")}
    shown = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("train", "heldout", "sibling")}
    assert all(f'"topic": "{name}"' in shown["sibling"] for name in siblings)
    assert not any(f'"topic": "{name}"' in shown["train"] + shown["heldout"] for name in siblings)


def test_hints_on_the_guild_are_followed_by_all_its_topics(renderer: Renderer) -> None:
    world = World(GUILDS)
    teacher = _Teacher(world, renderer, WarmStartConfig(slip=0.0, other_topic=1.0), Random(0))
    names = {topic.name: topic for topic in world.topics}
    followed: Counter[bool] = Counter()
    for ids, response in (teacher.replay() for _ in range(1500)):
        note = renderer.decode(ids).partition("Heuristics: When asked about ")[2]
        topic = names[response.removeprefix("For ").partition(",")[0]]
        if note.startswith(topic.guild):
            followed[
                note.partition("use ")[2].partition(".")[0] == response.partition("use ")[2].partition(".")[0]
            ] += 1
    assert set(followed) == {True}
    assert followed[True] > 20


def test_every_word_of_a_guild_is_one_token(renderer: Renderer) -> None:
    topic = World(GUILDS).topics[0]
    assert len(renderer.encode(" " + topic.guild)) == 2


def test_a_critique_sees_one_attempt_and_names_another_rule(renderer: Renderer) -> None:
    world = World(GUILDS)
    teacher = _Teacher(world, renderer, WarmStartConfig(slip=0.0), Random(0))
    for ids, response in (teacher.critique() for _ in range(200)):
        shown = renderer.decode(ids)
        assert "Right:" not in shown
        used = shown.partition("use ")[2].partition(".")[0]
        assert response.startswith("Bifurcation: the choice of rule.")
        assert f"I used {used}, but" in response
        assert not response.endswith(f"use {used}.")


def test_guilds_want_their_sizes() -> None:
    with pytest.raises(ValidationError, match="must be 32 each"):
        WorldConfig(guilds=True)
