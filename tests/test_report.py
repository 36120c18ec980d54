"""The report of small synthetic runs, as a user asks for it; its parts have tests of their own in tests/report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from report.synthetic import case, embedded, evaluation, experiences, groups, make_run, settings, step

from mel_fast.errors import InputError
from mel_fast.report import Limits, summarise, write_report

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)>" & \u2028 \U0001d54f'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [
        evaluation(0, math=0.25, amc=0.5),
        step(1, 0.125, **{"mel/pairs": 1}),
        step(2, 0.5, **{"mel/pairs": 1}),
        step(3, 0.75, **{"mel/pairs": 0}),
        evaluation(3, math=0.75, amc=0.5),
    ]
    dumps = {n: [case(kept=n == 1, question=f"question {n}")] for n in (1, 2, 3)}
    return make_run(tmp_path / "20260131-142501-mel", lines, dumps)


def test_the_summary_tells_before_and_after(run: Path) -> None:
    assert summarise(run).rows() == [["math", *["0.250 -> 0.750"] * 3], ["amc", *["0.500 -> 0.500"] * 3]]


def test_a_set_name_may_have_slashes_and_sets_may_change_between_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [evaluation(0, **{"math-ai/aime25": 0.5}), evaluation(4, other=0.25)])
    assert summarise(run).rows() == [["math-ai/aime25", *["0.500 -> -"] * 3], ["other", *["- -> 0.250"] * 3]]
    titles = [figure["title"] for figure in embedded(write_report(run))["overview"]["figures"]]
    assert titles == [
        f"{name}: {score}" for name in ("math-ai/aime25", "other") for score in ("Pass@1", "Avg@8", "Pass@8")
    ]


def test_the_page_holds_curves_experiences_and_rollouts(run: Path) -> None:
    report = write_report(run)
    assert report == run / "report.html"
    table = embedded(report)["overview"]["runs"][0]["table"]
    assert table["steps"] == [0, 1, 2, 3]
    assert table["columns"]["reward/correct"] == [None, 0.125, 0.5, 0.75]
    assert table["columns"]["eval/math/pass_at_1"] == [0.25, None, None, 0.75]
    assert [(x["step"], x["status"], x["question"]) for x in experiences(report)] == [
        (1, "kept", "question 1"),
        (2, "failed", "question 2"),
        (3, "failed", "question 3"),
    ]
    assert [group["step"] for group in groups(report)] == [1, 2, 3]


def test_a_dump_without_experiences_is_not_read_for_them(run: Path) -> None:
    """A run's dumps may take many gigabytes."""
    (run / "rollouts" / "step_000003.jsonl").write_text("not read\n")
    report = write_report(run, limits=Limits(rollout_steps=0))
    assert [x["step"] for x in experiences(report)] == [1, 2]


def test_no_text_reaches_the_page_as_markup(tmp_path: Path) -> None:
    made = case(question=EVIL, wrong=EVIL, right=EVIL + "!", memo=(EVIL, EVIL, EVIL), id=EVIL, family=EVIL)
    config = settings(run__name=EVIL)
    run = make_run(
        tmp_path / "<b>run", [evaluation(0, **{EVIL: 0.5}), step(1, **{f"odd/{EVIL}": 1})], {1: [made]}, config
    )
    report = write_report(run)
    html = report.read_text("utf-8")
    assert "alert(1)" not in html
    assert "<b>" not in html
    assert experiences(report)[0]["meta"] == [EVIL] * 3


def test_a_run_in_progress_is_read_up_to_its_last_whole_line(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/cor')
    (run / "rollouts" / "step_000004.partial").write_text("{")
    config = (run / "config.yaml").read_text().replace("steps: 3", "steps: 9")
    (run / "config.yaml").write_text(config)
    shown = embedded(write_report(run))["overview"]["runs"][0]
    assert (shown["steps_done"], shown["steps"]) == (3, 9)


def test_a_run_that_diverged_still_gets_its_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step(1, 0.5), step(2, float("nan")), step(3, float("inf")), step(4, 1.0)])
    table = embedded(write_report(run))["overview"]["runs"][0]["table"]
    assert table["columns"]["reward/correct"] == [0.5, None, None, 1.0]
    assert table["broken"] == {"reward/correct": [2, 3]}


def test_a_run_without_dumps_says_so(tmp_path: Path) -> None:
    data = embedded(write_report(make_run(tmp_path / "run", [step(1)])))
    assert data["experiences"]["notes"] == ["run: 0 of 0 meta-experiences."]
    assert data["rollouts"]["notes"] == ["run: 0 of 0 groups, from 0 of 0 dumped steps."]


def test_what_is_left_out_is_evenly_spaced_and_said(tmp_path: Path) -> None:
    dumps = {n: [case(question=f"{n}.{i}") for i in range(4)] for n in range(1, 11)}
    run = make_run(tmp_path / "run", [step(n) for n in range(1, 11)], dumps)
    report = write_report(run, limits=Limits(experiences=10, rollout_steps=4))
    assert [x["question"] for x in experiences(report)] == [f"{n}.0" for n in range(1, 11)]
    assert sorted({group["step"] for group in groups(report)}) == [1, 4, 7, 10]
    data = embedded(report)
    assert data["experiences"]["notes"] == ["run: 10 of 40 meta-experiences."]
    assert data["rollouts"]["notes"] == ["run: 16 of 16 groups, from 4 of 10 dumped steps."]


def test_dumps_beyond_the_limit_are_not_read_and_that_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step(n) for n in range(1, 9)], {n: [case()] for n in range(1, 9)})
    size = (run / "rollouts" / "step_000001.jsonl").stat().st_size
    report = write_report(run, limits=Limits(dump_bytes=4 * size))
    assert [x["step"] for x in experiences(report)] == [1, 3, 6, 8]
    assert "4 of 8 dumped steps were read" in embedded(report)["experiences"]["notes"][0]


def test_several_runs_share_a_page_and_its_limits(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, [step(1, 0.1 * i)], {1: [case() for _ in range(8)]}, settings(run__seed=i))
        for i, name in enumerate("ab")
    ]
    report = write_report(*runs, out=tmp_path / "both.html", limits=Limits(experiences=8))
    data = embedded(report)
    assert [run["name"] for run in data["overview"]["runs"]] == ["a", "b"]
    assert data["overview"]["groups"][0]["runs"] == [0, 1]  # they differ in nothing but the seed
    assert [x["run"] for x in experiences(report)] == [0] * 4 + [1] * 4


def test_a_run_without_anything_measured_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"empty-run: no step has finished"):
        write_report(make_run(tmp_path / "empty-run", []))


def test_a_folder_without_metrics_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path.name}.*no metrics\.jsonl"):
        write_report(tmp_path)


def test_naming_a_run_twice_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(run)
    with pytest.raises(InputError, match="twice"):
        write_report(run, tmp_path / "latest")


def test_the_command_prints_the_path_or_one_line_of_error(run: Path, tmp_path: Path) -> None:
    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "mel_fast.report", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)

    done = command(run, "--rollout-steps=1", "--out", tmp_path / "here.html")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "here.html"))
    assert {group["step"] for group in groups(tmp_path / "here.html")} == {3}
    failed = command(tmp_path / "nowhere")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
