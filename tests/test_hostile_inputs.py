"""Whatever stands in a file: rows or a configuration, or one error that names the file and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mel_fast.config import ConfigError, load_config, overrides
from mel_fast.data import Source, load_prompts
from mel_fast.schemas import DataError

QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(("question", "answer", "prompt", "id", "x"), VALUES)) | VALUES


def read(path: Path) -> None:
    told = ""
    try:
        assert load_prompts(Source(path=str(path)))
    except DataError as error:
        told = str(error)
    assert not told or str(path) in told
    assert "\n" not in told


@QUICK
@given(st.lists(ROWS, max_size=4), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_rows_of_any_kind(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], end: str, bom: bool) -> None:
    folder = tmp_path_factory.mktemp("rows")
    mark = b"\xef\xbb\xbf" if bom else b""
    for suffix, text in (("jsonl", end.join(map(json.dumps, rows))), ("json", json.dumps(rows))):
        path = folder / f"data.{suffix}"
        path.write_bytes(mark + text.encode())
        read(path)


@QUICK
@given(st.sampled_from(["jsonl", "json", "parquet"]), st.binary(max_size=200))
def test_bytes_of_any_kind(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"data.{suffix}"
    path.write_bytes(data)
    read(path)


GOOD = b'{"question": "1+1?", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 100_000, r"data\.jsonl:2: .*nested too deep"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", r"data\.jsonl:2: .*write such a number as text"),
        (b'{"question": "\\ud800", "answer": "2"}', r"data\.jsonl:2: the question has half a surrogate pair"),
        (b'{"question": "q", "answer": "\\udc00"}', r"data\.jsonl:2: the answer has half a surrogate pair"),
        (b'{"question": "q", "answer": [["1"]]}', r"data\.jsonl:2: the answer is a list of lists"),
        (b'{"a\\nb": 1}', r"data\.jsonl:2: .*'a\\nb'"),
        (b'{"question": "q", "answer": NaN}', r"data\.jsonl:2: the answer must be text or a number"),
    ],
)
def test_a_row_that_would_hurt_later_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(DataError, match=words):
        load_prompts(Source(path=str(path)))


@pytest.mark.parametrize("name", ["folder.jsonl", "data.jsonl.gz", "x" * 300 + ".jsonl", "x" * 300])
def test_what_is_no_file_of_rows_is_said(tmp_path: Path, name: str) -> None:
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    elif name.endswith("gz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError):
        load_prompts(Source(path=str(tmp_path / name)))


def configure(path: Path) -> str:
    told = str(path)
    try:
        load_config(str(path))
    except ConfigError as error:
        told = str(error)
    assert str(path) in told
    return "" if told == str(path) else told


@QUICK
@given(
    st.dictionaries(
        st.sampled_from(["run", "model", "data", "mel", "optim", "rollout", "tiny", "base", "odd", "verify"]), VALUES
    )
)
def test_configurations_of_any_kind(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("configuration") / "run.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    assert configure(path)  # it has no data, at the least


@QUICK
@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")))
def test_yaml_of_any_kind(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("configuration") / "run.yaml"
    path.write_bytes(data)
    assert configure(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {steps: 1}\nrun: {steps: 2}", "the key 'run' is there twice.*line 2"),
        ("run: {steps: 1, steps: 2}", "the key 'steps' is there twice"),
        ("[" * 5000, "not valid YAML"),
        ("run: {name: 2024-13-45}", "not valid YAML: month must be"),
        ("run: {seed: " + "9" * 5000 + "}", "not valid YAML"),
        ("base: " + "x" * 300, "its base"),
        ("- a list", "expected sections"),
        ("run: !!python/object/apply:os.system [true]", "not valid YAML"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(12))
            + "run: {steps: *m}",
            "run.steps",
        ),
    ],
)
def test_a_configuration_that_would_hurt_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(str(path))
    assert len(str(refused.value)) < 5000


def test_a_value_of_the_command_line_is_named() -> None:
    for word in ("--run.name=2024-13-45", "--run.seed=" + "[" * 5000, "--run.seed={a: 1, a: 2}"):
        with pytest.raises(ConfigError, match=r"--run\."):
            overrides([word])
