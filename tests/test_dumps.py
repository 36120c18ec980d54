"""Episodes on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import episode, experience
from hypothesis import given
from hypothesis import strategies as st

from mel_fast.dumps import dump_episodes, load_episodes, read_jsonl
from mel_fast.errors import InputError
from mel_fast.types import Episode, Experience, MetaExperience, Prompt, Trajectory

numbers = st.integers(0, 2**40)
floats = st.floats(allow_nan=False)
trajectories = st.builds(
    Trajectory,
    st.lists(numbers),
    st.lists(numbers),
    st.lists(floats),
    st.sampled_from(["stop", "length"]),
    st.lists(st.tuples(numbers, numbers)),
    st.text(),
    floats,
    st.booleans(),
    st.text(),
    st.none() | numbers,
)
messages = st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=2).map(tuple)
experiences = st.builds(
    Experience,
    numbers,
    numbers,
    trajectories,
    st.none() | st.builds(MetaExperience, st.text(), st.text(), st.text()),
    st.text(),
    st.none() | trajectories,
    st.booleans(),
)
prompts = st.builds(Prompt, st.text(), st.text(), st.text(), st.text(), st.none() | messages)
episodes = st.builds(Episode, numbers, prompts, st.lists(trajectories, max_size=2), st.lists(experiences, max_size=2))


@given(st.lists(episodes, max_size=3))
def test_what_is_dumped_is_what_is_loaded(tmp_path_factory: pytest.TempPathFactory, made: list[Episode]) -> None:
    path = tmp_path_factory.getbasetemp() / "dump.jsonl"
    dump_episodes(path, made)
    assert load_episodes(path) == made


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


@pytest.mark.parametrize("torn", [b'{"step": 3, "a"', b'{"text": "caf\xc3"}', b"[1, 2]", b"17"])
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
    with pytest.raises(InputError, match=r"data\.jsonl: not a dump"):
        load_episodes(tmp_path / "data.jsonl")
