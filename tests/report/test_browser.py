"""Reports as a reader meets them: opened from a file in headless Chromium (conftest.py)."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from factories import episode
from report.conftest import Open
from report.synthetic import case, evaluation, make_run, settings, step
from transformers import PreTrainedTokenizerBase

from mel_fast.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser
EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"`${window.hacked=1}&lt;b&gt;'


def opened(page: Page) -> Locator:
    return page.locator("article.opened")


def see(page: Page, words: str, within: str = "main") -> None:
    page.locator(within).get_by_text(words).first.wait_for()


def test_a_report_opens_from_a_file_with_every_chart_drawn(tmp_path: Path, visit: Open) -> None:
    lines = [evaluation(0, math=0.25), *(step(n, n / 10, **{"mel/retention": 0.5}) for n in range(1, 9))]
    page = visit(write_report(make_run(tmp_path / "run", lines)))
    page.set_viewport_size({"width": 1440, "height": 4000})
    figures = page.locator("figure")
    assert figures.count() == 7
    for index in range(figures.count()):
        figures.nth(index).locator("canvas").wait_for()
    assert page.locator("table.scores b").first.text_content() == "0.250"


def test_pointing_at_a_chart_tells_the_values_of_that_step(tmp_path: Path, visit: Open) -> None:
    lines = [step(n, n / 10) for n in range(1, 10)]
    page = visit(write_report(make_run(tmp_path / "run", lines)))
    page.locator("figure .u-over").first.hover()  # in the middle
    legend = page.locator("figure .u-legend").first
    assert legend.locator("th, td").all_text_contents() == ["step", "5", "reward/correct", "0.5"]


def test_seeds_are_a_mean_with_a_band_and_a_run_can_be_hidden(tmp_path: Path, visit: Open) -> None:
    runs = [
        make_run(tmp_path / f"{mel}{seed}", [step(n, base + 0.1 * seed) for n in (1, 2, 3)], None, config)
        for mel, base in ((True, 0.2), (False, 0.6))
        for seed in (0, 2)
        for config in [settings(run__seed=seed, mel__enabled=mel)]
    ]
    page = visit(write_report(*runs, out=tmp_path / "all.html"))
    page.locator("figure .u-over").first.hover()
    legend = page.locator("figure").first.locator(".u-legend")
    rows = [row for row in (legend.inner_text()).splitlines() if row.strip()]
    text = " ".join(rows)
    assert "mel.enabled=true (mean of 2)" in text
    assert "0.3" in text
    assert "0.7" in text
    assert "highest" not in text  # the band's edges have no entry of their own
    page.get_by_role("button", name="mel.enabled=false").click()
    assert "mel.enabled=false" not in legend.inner_text()
    page.get_by_label("seeds as mean").uncheck()
    assert "(seed 2)" in legend.inner_text()


def test_a_run_in_progress_says_so(tmp_path: Path, visit: Open) -> None:
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], config=settings(run__steps=9))))
    see(page, "not finished when this was written")
    see(page, "1 / 9")


def test_the_theme_follows_the_reader(tmp_path: Path, visit: Open) -> None:
    page = visit(write_report(make_run(tmp_path / "run", [step(1)])))
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_an_experience_shows_where_the_solutions_part(tmp_path: Path, visit: Open) -> None:
    made = case(wrong="First 2, then 3.", right="First 2, then 4.", memo=('at "then 3"', "I slipped.", "Check."))
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], {1: [made]})), "#experience=run%2F1%2F0%2F0")
    pair = opened(page).locator(".pair .text")
    assert pair.all_text_contents() == ["First 2, then 3.", "First 2, then 4."]
    assert "".join(pair.first.locator("mark.bifurcation").all_text_contents()) == "then 3"
    assert pair.last.locator("mark.difference").text_content() == "4"
    see(page, "(quoted in s*)")
    for words in ("I slipped.", "Check.", "the replay", "kept: its replay verified"):
        see(page, words)


def test_a_bifurcation_that_is_nowhere_in_the_text_is_said_to_be_so(tmp_path: Path, visit: Open) -> None:
    made = case(memo=("nowhere in particular", "hm", "Check."))
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], {1: [made]})), "#experience")
    see(page, "could not be located in the text")
    assert opened(page).locator(".pair mark.bifurcation").count() == 0


def test_keys_links_and_filters_lead_through_the_experiences(tmp_path: Path, visit: Open) -> None:
    dumps = {n: [case(kept=n != 2, question=f"question {n}", id=f"p{n}")] for n in (1, 2, 3)}
    report = write_report(make_run(tmp_path / "run", [step(n) for n in dumps], dumps))
    page = visit(report, "#experience=run%2F2%2F0%2F0")
    see(page, "question 2", ".opened")
    page.keyboard.press("j")
    see(page, "question 3", ".opened")
    assert page.evaluate("location.hash") == "#experience=run%2F3%2F0%2F0"
    page.keyboard.press("k")
    see(page, "question 2", ".opened")
    page.get_by_label("verdict").select_option("kept")
    see(page, "2 of 3 meta-experiences")
    see(page, "question 1", ".opened")
    page.evaluate("location.hash = '#experience=run%2F2%2F0%2F0'")  # a link lifts the filter that hides its item
    see(page, "question 2", ".opened")
    page.get_by_label("step from").fill("3")
    see(page, "1 of 3 meta-experiences")
    page.get_by_label("step from").fill("")
    see(page, "3 of 3 meta-experiences")
    page.evaluate("location.hash = '#experience=run%2F9%2F0%2F0'")
    see(page, "This page does not hold run/9/0/0.")


def test_an_experience_leads_to_the_others_on_its_question(tmp_path: Path, visit: Open) -> None:
    dumps = {n: [case(kept=n != 4, id="p1"), case(id="p2")] for n in (1, 4)}
    dumps[4][0].experiences[0].reflection.logprobs = [-0.5, -1.0, -1.5]
    report = write_report(make_run(tmp_path / "run", [step(n, **{"nll/retrospective": 1.0}) for n in dumps], dumps))
    page = visit(report, "#experience=run%2F1%2F0%2F0")
    rows = opened(page).locator("table.over tbody tr")
    assert [" ".join(text.split()) for text in rows.all_inner_texts()] == ["1, this one kept 0.25", "4 failed 1"]
    rows.get_by_role("link").click()
    see(page, "4, this one", ".opened")
    opened(page).get_by_role("link", name="NLL of what is internalised").click()
    see(page, "NLL of what is internalised", "figure")


def test_the_header_of_a_narrow_window_shows_everything(tmp_path: Path, visit: Open) -> None:
    page = visit(write_report(make_run(tmp_path / "20260131-142501-run", [step(1)])))
    page.set_viewport_size({"width": 400, "height": 800})
    for part in (page.locator("h1"), page.locator("#theme"), page.get_by_role("link", name="Rollouts")):
        box = part.bounding_box()
        assert box is not None
        assert (box["x"] >= 0, box["width"] > 20, box["x"] + box["width"] <= 400) == (True, True, True)


def test_experiences_are_filtered_by_reason_and_family(tmp_path: Path, visit: Open) -> None:
    odd = case(family="")
    odd.experiences[0].meta, odd.experiences[0].malformed, odd.experiences[0].kept = None, "no critique", False
    odd.experiences[0].replay = None
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], {1: [case(), odd, case()]})), "#experience")
    page.get_by_label("reason").select_option("well-formed")
    see(page, "2 of 3 meta-experiences")
    page.get_by_label("reason").select_option("no critique")
    see(page, "1 of 3 meta-experiences")
    see(page, "None: a malformed M is not replayed.")
    page.get_by_label("family").select_option("algebra")
    see(page, "Nothing fits these filters.")
    page.get_by_label("family").select_option("(none)")
    see(page, "dropped: malformed (no critique)")


def test_text_is_searched_in_everything_and_marked(tmp_path: Path, visit: Open) -> None:
    dumps = {1: [case(question="apples"), case(wrong="about PEARS"), case(memo=("s", "c", "mind the pears"))]}
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], dumps)), "#experience")
    page.keyboard.press("/")
    page.keyboard.type("pears")
    see(page, "2 of 3 meta-experiences")
    assert opened(page).locator("mark.hit").first.text_content() == "PEARS"
    page.get_by_label("Search").fill("nowhere at all")
    see(page, "Nothing fits these filters.")


def test_tokens_are_coloured_by_log_prob_and_by_gradient_weight(
    tmp_path: Path, visit: Open, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = episode([0, 1], id="p1")
    for response in made.trajectories:
        response.output_ids = tokenizer.encode("For petrel, use cedar.", add_special_tokens=False)
        response.logprobs = [0.0] * len(response.output_ids)
        response.logprobs[3] = -5.0
    run = make_run(tmp_path / "run", [step(1)], {1: [made]})
    tokenizer.save_pretrained(run / "model")
    page = visit(write_report(run), "#rollout=run%2F1%2F0")
    tokens = opened(page).locator(".tokens")
    assert tokens.text_content() == "For petrel, use cedar."
    odd = tokens.locator("span").nth(3)
    assert (odd.get_attribute("class"), tokens.locator("span").nth(0).get_attribute("class")) == (
        "unlikely s20",
        "unlikely s0",
    )
    page.get_by_role("button", name="gradient weight").click()
    assert odd.get_attribute("class") == "down s20"  # a wrong response
    assert tokens.locator("span[class]").count() == 1  # 1 - p is 0 elsewhere
    odd.hover()
    see(page, "log p -5.00, p 0.00674 · w 0.993")
    opened(page).locator("tbody tr").nth(1).click()
    assert odd.get_attribute("class") == "up s20"
    see(page, "w = |A| (1 − p)")


def test_without_a_tokenizer_the_ids_are_shown_with_a_note(tmp_path: Path, visit: Open) -> None:
    page = visit(write_report(make_run(tmp_path / "run", [step(1)], {1: [case()]})), "#rollout")
    see(page, "Token ids are shown in place of texts")
    assert opened(page).locator(".tokens").text_content() == "10 11 "


@pytest.mark.parametrize("fragment", ["", "#experience", "#rollout", "#experience=%3Cimg%20src=x%3E", "#odd%%"])
def test_what_a_model_wrote_cannot_become_part_of_the_page(tmp_path: Path, visit: Open, fragment: str) -> None:
    made = case(question=EVIL, wrong=EVIL, right=EVIL + "!", memo=(EVIL, EVIL, EVIL), id=EVIL, family=EVIL)
    made.trajectories[0].reason = made.trajectories[1].reason = EVIL
    name = "run<img src=x onerror=window.hacked=1>"
    lines = [evaluation(0, **{EVIL: 0.5}), step(1, **{f"odd/{EVIL}": 1})]
    other = make_run(tmp_path / "other", lines, {1: [made]}, settings(run__name=EVIL, mel__enabled=EVIL))
    run = make_run(tmp_path / name, lines, {1: [made]}, settings(run__name=EVIL))
    page = visit(write_report(run, other, out=tmp_path / "all.html"), fragment)
    page.set_viewport_size({"width": 1440, "height": 5000})  # every chart is in view
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0
    if fragment in ("#experience", "#rollout"):
        assert opened(page).locator(".text").first.text_content() == EVIL


@pytest.mark.slow
def test_ten_thousand_experiences_stay_readable(
    tmp_path: Path, visit: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length))

    dumps = {
        n: [
            case(
                (n + i) % 4 > 0,
                f"problem {n}.{i}: {text(40)}",
                text(160),
                text(160),
                (text(10), text(30), text(20)),
                f"p{i}",  # each question comes again in every step
            )
            for i in range(100)
        ]
        for n in range(1, 101)
    }
    dumps[77][33].experiences[0].reflection.text += " a needle"
    run = make_run(tmp_path / "run", [step(n) for n in dumps], dumps)
    seconds: dict[str, float] = {}

    def timed(what: str, since: float) -> None:
        seconds[what] = time.perf_counter() - since

    start = time.perf_counter()
    report = write_report(run)
    timed("written", start)
    start = time.perf_counter()
    page = visit(report, "#experience")
    see(page, "10,000 of 10,000 meta-experiences")
    see(page, "problem 1.0", ".opened")
    timed("opened", start)
    assert page.locator(".items li").count() == 50
    start = time.perf_counter()
    page.get_by_label("verdict").select_option("failed")
    see(page, "2,500 of 10,000")
    timed("filtered", start)
    page.get_by_label("verdict").select_option("")
    start = time.perf_counter()
    page.get_by_label("Search").fill("a needle")
    see(page, "1 of 10,000")
    see(page, "problem 77.33", ".opened")
    timed("searched", start)
    with capsys.disabled():
        print(
            f"\n10,000 experiences: {report.stat().st_size / 1e6:.1f} MB", {k: round(v, 2) for k, v in seconds.items()}
        )
