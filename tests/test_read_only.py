"""Folders that can be read and not be written: what only reads works, what writes says so once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from report.synthetic import case, make_run, step
from test_disk import errors, finish
from test_guard import train_on_dumps
from test_learner import learner

from mel_fast.checkpoint import load_checkpoint, newest_sound, save_checkpoint
from mel_fast.distributed import World
from mel_fast.dumps import dump_episodes
from mel_fast.errors import OutputError
from mel_fast.report import write_report
from mel_fast.report.__main__ import main as report
from mel_fast.train import main


def system(*words: str | Path) -> bool:
    return subprocess.run([*map(str, words)], capture_output=True, check=False).returncode == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """By its rights, or, for root whom no rights stop, by a mount."""
    if os.geteuid() != 0:
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    if not system("mount", "--bind", folder, folder):
        pytest.skip("root may write everywhere, and may not mount anything here")
    try:
        if not system("mount", "-o", "remount,bind,ro", folder):
            pytest.skip("root may write everywhere, and may not mount anything read-only here")
        yield
    finally:
        assert system("umount", folder)


def test_no_run_begins_where_nothing_can_be_written(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_on_dumps(model_folder, tmp_path, [], 2)
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs"):
        status, said = finish(arguments, capsys)
    assert status == 1
    assert len(errors(said)) == 1
    assert f"error: {tmp_path}/runs/" in said
    assert "cannot be written (" in said


def test_a_run_does_not_go_on_where_nothing_can_be_written(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*train_on_dumps(model_folder, tmp_path, [], 4), "--run.checkpoint_every=1"]
    assert main([*arguments, "--run.steps=2"]) == 0
    run = (tmp_path / "runs" / "latest").resolve()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with read_only(run):
        status, said = finish(["--resume", str(run), "--run.steps=4"], capsys)
    assert status == 1
    assert len(errors(said)) == 1
    assert f"error: {tmp_path}/runs/" in said
    assert "cannot be written (" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["--resume", str(run), "--run.steps=4"]) == 0


def test_a_checkpoint_is_read_from_where_none_can_be_written(model_folder: Path, tmp_path: Path, world: World) -> None:
    trained = learner(model_folder, world)
    path = save_checkpoint(tmp_path / "checkpoints", 1, trained, {"cursor": 5}, 1, world)
    weight = next(trained.policy.parameters()).detach()
    saved = weight.clone()
    weight.zero_()
    with read_only(tmp_path / "checkpoints"):
        assert newest_sound(tmp_path / "checkpoints", world) == path
        assert load_checkpoint(path, trained)["cursor"] == 5
        with pytest.raises(OutputError, match=r"step_000002: the checkpoint cannot .*step_000001 is untouched"):
            save_checkpoint(tmp_path / "checkpoints", 2, trained, {}, 1, world)
    torch.testing.assert_close(weight, saved)
    assert newest_sound(tmp_path / "checkpoints", world) == path


def test_a_report_is_written_elsewhere_when_the_run_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", [step(1)], {1: [case()]})
    earlier = write_report(run).read_bytes()
    with read_only(run):
        monkeypatch.setattr("sys.argv", ["report", str(run)])
        assert report() == 1
        said = capsys.readouterr().err.splitlines()
        assert [f"error: {run}/report.html: cannot be written (" in line for line in said] == [True]
        write_report(run, out=tmp_path / "here.html")
        with pytest.raises(OutputError, match=r"dump\.jsonl: cannot be written"):
            dump_episodes(run / "dump.jsonl", [case()])
    assert (run / "report.html").read_bytes() == earlier
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html", "rollouts"]
