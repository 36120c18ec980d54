"""Episodes on disk."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from factories import episode, experience
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mel_fast.dumps import dump_episodes, load_episodes, read_jsonl
from mel_fast.errors import InputError
from mel_fast.types import Episode, Experience, MetaExperience, Prompt, Trajectory

numbers = st.integers(0, 2**40)
floats = st.floats(allow_nan=False)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)
texts = st.text(st.characters(codec="utf-8")) | st.sampled_from(["\u2028\u2029", "\r\n", "\0", "\u202e", "\ufeff"])
FILES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    output = draw(ids)
    return Trajectory(
        draw(ids),
        output,
        draw(st.lists(floats, min_size=len(output), max_size=len(output))),
        draw(st.sampled_from(["stop", "length"])),
        draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3)),
        draw(texts),
        draw(floats),
        draw(st.booleans()),
        draw(texts),
        draw(st.none() | numbers),
        draw(texts),
    )


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    group = draw(st.lists(trajectories(), max_size=2))
    index = st.integers(0, len(group) - 1)
    contrasts = st.builds(
        Experience,
        index,
        index,
        trajectories(),
        st.none() | st.builds(MetaExperience, texts, texts, texts),
        texts,
        st.none() | trajectories(),
        st.booleans(),
    )
    messages = st.lists(st.dictionaries(texts, texts, max_size=2), max_size=2).map(tuple)
    prompt = draw(st.builds(Prompt, texts, texts, texts, texts, st.none() | messages))
    found = draw(st.lists(contrasts, max_size=2)) if group else []
    return Episode(draw(numbers), prompt, group, found, draw(st.dictionaries(texts, numbers, max_size=2)))


def read(path: Path) -> list[Episode] | str:
    """The episodes, or the one error that there may be."""
    try:
        return load_episodes(path)
    except InputError as error:
        return str(error)


@settings(FILES, max_examples=60)
@given(st.lists(episodes(), max_size=2))
def test_what_is_dumped_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, made: list[Episode]) -> None:
    path = tmp_path_factory.getbasetemp() / "dump.jsonl"
    dump_episodes(path, made)
    assert load_episodes(path) == made


DUMPED = "".join(json.dumps(asdict(e)) + "\n" for e in (episode([1, 0], experiences=[experience()]), episode([0])))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *places(inner))]


@FILES
@given(st.data())
def test_an_altered_dump_is_read_or_told_with_file_and_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A value is of another kind, is missing, or has another name."""
    rows = [json.loads(line) for line in DUMPED.splitlines()]
    holder, key = data.draw(st.sampled_from(places(rows[0])))
    value = holder.pop(key)
    if data.draw(st.booleans()):
        value = data.draw(st.just(value) | VALUES)
        if isinstance(holder, list):
            holder.insert(key, value)
        else:
            holder[data.draw(st.sampled_from([key, f"{key}x"]))] = value
    path = tmp_path_factory.getbasetemp() / "altered.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read(path)
    assert len(found) == 2 if isinstance(found, list) else re.match(rf"{re.escape(str(path))}, line 1: .*\)$", found)


@FILES
@given(st.floats(0, 1), st.integers(0, 255), st.sampled_from(["flip", "cut", "insert", "mark", "CRLF"]))
def test_damaged_bytes_are_read_or_told_with_file_and_line(
    tmp_path_factory: pytest.TempPathFactory, place: float, by: int, kind: str
) -> None:
    data = bytearray(DUMPED.encode())
    at = int(place * (len(data) - 1))
    if kind == "flip":
        data[at] ^= by
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = bytes([by]) * 1000
    elif kind == "mark":
        data[:0] = codecs.BOM_UTF8
    else:
        data = bytearray(data.replace(b"\n", b"\r\n"))
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(data)
    found = read(path)
    assert isinstance(found, list) or re.match(rf"{re.escape(str(path))}, line \d+: .*\)$", found)
    assert isinstance(found, list) or kind != "CRLF"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"reward"', '"rewarb"', r"trajectories\.0\.rewarb: Unexpected"),
        ('"output_ids": [', '"output_ids": [5, ', r"trajectories\.0: 2 log-probs for 3 tokens"),
        ('"wrong": 0', '"wrong": 7', r"experiences\.0: of trajectories 7 and 1, and there are 2"),
        ('"prompt_ids": [1', '"prompt_ids": [-1', r"trajectories\.0: token id -1, and there are 2147483648"),
        (
            '"prompt_ids": [1',
            f'"prompt_ids": [{2**70}',
            rf"trajectories\.0: token id {2**70}, and there are 2147483648",
        ),
        ("[[0, 2]]", "[]", r"trajectories\.0: no version of the weights"),
        ('"step": 0', '"step": ' + "9" * 5000, r"Invalid JSON: number out of range"),
        ('"step": 0', '"step": ' + "[" * 100_000, r"Invalid JSON: recursion limit"),
    ],
)
def test_what_would_hurt_later_is_named(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text("\n" + DUMPED.replace(old, new, 1))
    with pytest.raises(InputError, match=rf"dump\.jsonl, line 2: not an episode as dumped \({told}"):
        load_episodes(path)


def test_a_dump_that_was_cut_off_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    """Unlike metrics, it is written at once."""
    path = tmp_path / "dump.jsonl"
    path.write_text(DUMPED[:-20])
    with pytest.raises(InputError, match=r"dump\.jsonl, line 2: .*EOF"):
        load_episodes(path)


def test_what_is_no_text_does_not_stop_a_run(tmp_path: Path) -> None:
    made = episode([0])
    made.trajectories[0].reason = "half a pair: \ud800"
    dump_episodes(tmp_path / "dump.jsonl", [made])
    assert load_episodes(tmp_path / "dump.jsonl")[0].trajectories[0].reason == "half a pair: ?"


def test_a_dump_is_one_line_per_episode_that_others_can_read(tmp_path: Path) -> None:
    dump_episodes(tmp_path / "a.jsonl", [episode([1, 0], experiences=[experience()]), episode([0])])
    first, second = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines())
    assert first["experiences"][0]["meta"]["heuristics"] == "When terms cancel, check signs."
    assert second["trajectories"][0]["reward"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]  # nothing half-written beside it


@pytest.mark.parametrize("torn", [b'{"step": 3, "a"', b'{"text": "caf\xc3', b'{"st'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_whole_last_line_counts_without_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "a"', b'{"text": "caf\xc3"}', b"[1, 2]", b"17", b"[" * 100_000])
def test_a_bad_line_in_the_middle_is_an_error_that_names_file_and_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn + b'\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)


def test_a_missing_dump_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step_000009\.jsonl.*run\.rollouts"):
        load_episodes(tmp_path / "step_000009.jsonl")


@pytest.mark.parametrize(
    "line", ['{"question": "1+1?", "answer": "2"}', '{"prompt": "1+1?"}', '{"prompt": {"messages": 1}}']
)
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"data\.jsonl, line 1: not an episode as dumped"):
        load_episodes(tmp_path / "data.jsonl")
