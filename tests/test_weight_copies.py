"""The copy of the weights that servers read: gone with the run, or with the next one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from mel_fast.rollout.sglang.transport import Copy, choose_parent


def write_and_die(parent: Path) -> None:
    copy = Copy(parent)
    copy.add([("weight", torch.ones(4))], 1)
    copy.finish()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_has_left_is_removed_by_the_next_and_what_a_living_one_needs_is_not(tmp_path: Path) -> None:
    living = Copy(tmp_path)
    living.add([("weight", torch.ones(4))], 1)
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2

    another = Copy(tmp_path)
    assert set(tmp_path.iterdir()) == {living.root, another.root}
    living.finish()
    assert [name for name, _ in living.read()] == ["weight"]
    living.close()
    another.close()
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_version_stays(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    for version in (1, 2):
        copy.add([("weight", torch.full((4,), float(version)))], version)
        copy.finish()
        copy.drop_older()
    assert [folder.name for folder in copy.root.iterdir() if folder.is_dir()] == ["2"]
    assert [tensor.tolist() for _, tensor in copy.read()] == [[2.0] * 4]
    copy.close()


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder named; in shared memory if there is room for two; beside the run's files."""
    monkeypatch.setattr("mel_fast.rollout.sglang.transport.SHARED_MEMORY", tmp_path / "memory")
    named, run = tmp_path / "named", tmp_path / "run"
    assert choose_parent(None, run, 1) == run, "no shared memory"
    (tmp_path / "memory").mkdir()
    assert choose_parent(None, run, 1) == tmp_path / "memory"
    assert choose_parent(None, run, 2**60) == run
    assert choose_parent(str(named), run, 1) == named
