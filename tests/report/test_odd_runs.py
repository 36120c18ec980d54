"""Run directories that somebody changed: a report, or one error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report.synthetic import case, make_run, step

from mel_fast.errors import InputError
from mel_fast.report import write_report

FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
)
SCORES = {f"eval/math/{score}": st.floats(0, 1) | VALUES for score in ("pass_at_1", "avg_at_k", "pass_at_k")}
LINES = st.fixed_dictionaries({}, optional={"step": st.integers(0, 9) | VALUES, "mel/pairs": VALUES, **SCORES})
KEYS = {
    "run": ("name", "seed", "steps"),
    "model": ("path",),
    "rollout": ("max_new_tokens",),
    "objective": ("algorithm", "overlong"),
    "eval": ("samples",),
}
SECTIONS = {
    section: VALUES | st.fixed_dictionaries({}, optional=dict.fromkeys(keys, VALUES)) for section, keys in KEYS.items()
}


def report(folder: Path, lines: list[Any], config: dict[str, Any] | None = None) -> None:
    told = str(folder)
    try:
        write_report(make_run(folder, lines, {1: [case()]}, config))
    except InputError as error:
        told = str(error)
    assert str(folder) in told
    assert "\n" not in told


@FEW
@given(st.lists(LINES, max_size=3))
def test_metrics_of_any_kind(tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any]]) -> None:
    report(tmp_path_factory.mktemp("runs") / "run", lines)


@FEW
@given(st.fixed_dictionaries({}, optional=SECTIONS))
def test_settings_of_any_kind(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    report(tmp_path_factory.mktemp("runs") / "run", [step(1)], config)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"loss/total": 1.0}, "no step, but None"),
        ({"step": "2"}, "no step, but '2'"),
        ({"step": 2, "eval/math/pass_at_1": 0.5}, "'eval/math/avg_at_k' is no score, but None"),
    ],
)
def test_a_line_that_no_run_writes_is_named(tmp_path: Path, line: dict[str, Any], told: str) -> None:
    run = make_run(tmp_path / "run", [step(1), line])
    with pytest.raises(InputError, match=rf"metrics\.jsonl, line 2: {told}"):
        write_report(run)


@pytest.mark.parametrize("text", ["run: {name: 2024-13-45}", "[" * 5000, "run: ["])
def test_settings_that_are_no_yaml_are_named(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run", [step(1)])
    (run / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml: not valid YAML"):
        write_report(run)
