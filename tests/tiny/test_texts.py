"""Texts are short, one token per word, and reflections are what the parser of meta-experiences expects."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mel_fast.prompts import Renderer, parse_experience
from mel_fast.templates import PromptConfig
from mel_fast.tiny import texts
from mel_fast.tiny.config import WorldConfig
from mel_fast.tiny.texts import rule_heuristics, rule_reflection, slip_reflection, solution
from mel_fast.tiny.tokenizer import build_tokenizer
from mel_fast.tiny.world import Problem, Slip, World

ARBITRARY = build_tokenizer(texts.corpus())


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=" \n<>0x41eos▁Ġ\\boxed{}7.amber", max_size=40)))
def test_any_text_survives_the_round_trip(text: str) -> None:
    ids = ARBITRARY.encode(text, add_special_tokens=False)
    assert ARBITRARY.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("seed", [0, 1])
def test_every_word_is_one_token(renderer: Renderer, seed: int) -> None:
    world = World(WorldConfig(seed=seed))
    for topic, numbers in zip(world.topics, world.numbers, strict=False):
        problem, rule = Problem(topic, numbers), world.rules[0]
        for text in (
            problem.question,
            *(solution(problem, rule) for rule in world.rules),
            rule_reflection(topic, rule, topic.rule),
            slip_reflection(problem, rule, Slip(1, 2)),
        ):
            words = re.findall(r"\\boxed\{|[A-Za-z]+|\S|\n", text)
            assert [renderer.decode([token]).strip(" ") for token in renderer.encode(text)] == words


def test_texts_are_short(world: World, renderer: Renderer) -> None:
    for topic, numbers in zip(world.topics, world.numbers, strict=False):
        problem = Problem(topic, numbers)
        assert len(renderer.encode(problem.question)) <= 12
        assert len(renderer.answer(solution(problem, topic.rule))) <= 28
        assert len(renderer.answer(rule_reflection(topic, world.rules[0], world.rules[1]))) <= 40
        assert len(renderer.answer(slip_reflection(problem, topic.rule, Slip(0, 1)))) <= 40
        assert len(renderer.answer(rule_heuristics(topic, topic.rule))) <= 12


def test_prompt_words_are_tokens_too(renderer: Renderer, prompts: PromptConfig) -> None:
    for template in (prompts.solve, prompts.reflect, prompts.replay, prompts.recall):
        text = re.sub(r"\{\w+\}", "", template)
        assert len(renderer.encode(text)) == len(re.findall(r"[A-Za-z]+|[^\w ]", text))


def test_ids_do_not_depend_on_where_a_text_is_cut(world: World, renderer: Renderer) -> None:
    text = rule_reflection(world.topics[0], world.rules[0], world.rules[1])
    for cut in (match.start() for match in re.finditer(r"[ \n]", text)):
        assert renderer.encode(text[:cut]) + renderer.encode(text[cut:]) == renderer.encode(text)


def test_the_tokenizer_is_small_reproducible_and_a_real_one(renderer: Renderer, tmp_path: Path) -> None:
    tokenizer = renderer.tokenizer
    assert len(tokenizer) <= 512
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<user>What is amber worth for 3, 7 and 4?<assistant>Ünïcode\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<eos>", "<pad>")
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hm"},
    ]
    rendered = loaded.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<user>Hi<assistant>Ho<eos><user>Hm<assistant>"


def test_the_order_of_the_texts_does_not_matter() -> None:
    backwards = build_tokenizer(reversed(list(texts.corpus())))
    assert backwards.get_vocab() == ARBITRARY.get_vocab()


def test_reflections_parse_and_give_nothing_away(world: World) -> None:
    for index, (topic, numbers) in enumerate(zip(world.topics, world.numbers, strict=False)):
        problem, rule = Problem(topic, numbers), world.rules[index % 8]
        meta, reason = parse_experience(rule_reflection(topic, rule, topic.rule), problem.answer)
        assert meta is not None, reason
        assert topic.rule.name in meta.heuristics
        assert rule.name in meta.critique
        assert meta.heuristics == rule_heuristics(topic, topic.rule)
        assert not re.search(r"\d", meta.heuristics)
        meta, reason = parse_experience(slip_reflection(problem, rule, Slip(0, 4)), problem.answer)
        assert meta is not None, reason
        assert rule.first in meta.heuristics
        assert "first" in meta.bifurcation
        assert not re.search(r"\d", meta.heuristics)
