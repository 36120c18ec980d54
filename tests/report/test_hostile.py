"""Texts that want to be more than text, in a browser: shown as they are, found by a search, and nothing is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from factories import episode
from report.conftest import Open
from report.synthetic import case, embedded, evaluation, make_run, settings, step
from report.test_browser import EVIL, opened, see
from transformers import PreTrainedTokenizerBase

from mel_fast.report import write_report

pytestmark = pytest.mark.browser
TEXTS = {
    "script": "</script><script>window.hacked = 1</script>",
    "comment": "<!--<script>window.hacked = 1",
    "image": '<img src=x onerror="window.hacked = 1">',
    "link": "<a href='javascript:window.hacked = 1'>javascript:window.hacked = 1</a>",
    "separators": "one\u2028two\u2029three",
    "null": "a\0b\x1b[31m\x7f",
    "override": "\u202egnirts a \u2066 \u200f",
    "template": "{{nonce}} ${window.hacked = 1} {{title}} \\u003cimg",
    "names": "__proto__",
    "long": "<b>" * 350_000,
}


@pytest.mark.parametrize("view", ["experience", "rollout"])
def test_every_text_is_shown_as_it_is_and_found(tmp_path: Path, visit: Open, view: str) -> None:
    """In every place that a text may have, each with a number by which it is searched."""
    dumps = {}
    for number, text in enumerate(TEXTS.values(), start=1):
        said = f"{text} n{number}n"
        made = case(True, said, f"{said} wrong", f"{said} right", (said, said, said), id=text[:100], family=text[:100])
        for trajectory in made.trajectories:
            trajectory.reason = text[:100]
        dumps[number] = [made]
    page = visit(write_report(make_run(tmp_path / "run", [step(n) for n in dumps], dumps)), f"#{view}")
    for number, text in enumerate(TEXTS.values(), start=1):
        page.get_by_label("Search").fill(f"N{number}N")
        see(page, f"1 of {len(TEXTS)} ")
        page.wait_for_function(
            "text => document.querySelector('.opened .text').textContent === text", arg=f"{text} n{number}n"
        )
        if view == "experience":
            assert opened(page).locator(".pair .text").last.text_content() == f"{text} n{number}n right"
            assert opened(page).locator(".memo .text").all_text_contents() == [f"{text} n{number}n"] * 3
    page.get_by_label("Search").fill("")
    see(page, f"{len(TEXTS)} of {len(TEXTS)} ")
    page.get_by_label("family").select_option("__proto__")
    see(page, f"1 of {len(TEXTS)} ")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main b:not(.scores b)").count() == 0


@pytest.mark.parametrize("name", ["__proto__", "constructor", "toString"])
def test_names_that_javascript_knows_are_names(tmp_path: Path, visit: Open, name: str) -> None:
    lines = [evaluation(0, **{name: 0.25}), step(1, **{name: 1.0, f"{name}/x": 2.0})]
    run = make_run(tmp_path / name, lines, {1: [case(id=name, family=name), case()]}, settings(run__name=name))
    page = visit(write_report(run), f"#{name}")
    page.set_viewport_size({"width": 1440, "height": 5000})
    assert page.locator("table.scores tbody tr").first.locator("th, td").first.text_content() == name
    assert page.locator("table.scores b").first.text_content() == "0.250"
    page.goto(page.url.partition("#")[0] + "#experience")
    page.get_by_label("family").select_option(label=name)
    see(page, "1 of 2 meta-experiences")


def test_what_turns_the_direction_of_writing_turns_nothing_beside_it(tmp_path: Path, visit: Open) -> None:
    made = case(family="a \u202e", id="an id \u202e")
    made.trajectories[0].reason = "\u202e"
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], {1: [made]})), "#experience")
    see(page, "NLL of M when written")
    left = """() => [...document.querySelectorAll(".opened .meta")].flatMap((line) => {
        const nodes = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
        const places = [];
        while (nodes.nextNode()) for (const word of nodes.currentNode.data.matchAll(/[a-z]{4,}/gi)) {
            const range = document.createRange();
            range.setStart(nodes.currentNode, word.index);
            range.setEnd(nodes.currentNode, word.index + word[0].length);
            places.push([word[0], range.getBoundingClientRect().left, range.getBoundingClientRect().top]);
        }
        return [places];
    })"""
    for words in page.evaluate(left):
        assert [word for word, *_ in sorted(words, key=lambda word: (word[2], word[1]))] == [word for word, *_ in words]


def test_tokens_are_texts_too(tmp_path: Path, visit: Open, tokenizer: PreTrainedTokenizerBase) -> None:
    made = episode([0, 1])
    made.trajectories[0].output_ids = tokenizer.encode(EVIL, add_special_tokens=False)
    made.trajectories[0].logprobs = [-1.0] * len(made.trajectories[0].output_ids)
    run = make_run(tmp_path / "run", [step(1)], {1: [made]})
    tokenizer.save_pretrained(run / "model")
    page = visit(write_report(run), "#rollout")
    assert opened(page).locator(".tokens").text_content() == EVIL
    assert page.evaluate("window.hacked") is None


def test_what_is_no_text_is_shown_as_a_question_mark(tmp_path: Path, visit: Open) -> None:
    """Half a surrogate pair: of a folder whose name is not UTF-8, or spelt so in JSON or YAML."""
    run = make_run(
        tmp_path / os.fsdecode(b"run\xff"),
        [step(1, **{"odd/\ud800": 1.0})],
        {1: [case()]},
        settings(run__name="\ud800"),
    )
    report = write_report(run)
    assert embedded(report)["overview"]["runs"][0]["name"] == "run?"
    page = visit(report, "#experience")
    assert page.locator("h1").text_content() == "run?"
    see(page, "1 of 1 meta-experience")
    assert page.evaluate("location.hash") == "#experience=run%3F%2F1%2F0%2F0"
