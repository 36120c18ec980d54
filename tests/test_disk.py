"""Disks that fill up, forget or flip bytes: the run says which file, and its last good checkpoint stays."""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from factories import episode
from mel_kernels import LossConfig
from report.synthetic import case, evaluation, make_run
from support import random_samples
from test_guard import train_on_dumps
from test_learner import learner
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mel_fast.checkpoint import (
    CheckpointError,
    checkpoints,
    export_model,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
)
from mel_fast.distributed import World
from mel_fast.dumps import dump_episodes, read_jsonl
from mel_fast.errors import OutputError
from mel_fast.files import MANIFEST, write_whole
from mel_fast.learner import Learner
from mel_fast.report import write_report
from mel_fast.train import main

QUERY = "model.model.layers.0.self_attn.q_proj.weight"


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes in here: writing fails in the middle, as on a full disk, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def write(trained: Learner, folder: Path, steps: tuple[int, ...], world: World, keep: int = 9) -> None:
    for step in steps:
        save_checkpoint(folder, step, trained, {"cursor": step}, keep, world)


@pytest.fixture(scope="module")
def trained(model_folder: Path) -> Learner:
    result = learner(model_folder, World(0, 1, torch.device("cpu")))
    result.update([random_samples(400)], LossConfig())
    return result


@pytest.fixture(scope="module")
def two(trained: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write(trained, folder, (1, 2), World(0, 1, torch.device("cpu")))
    return folder


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "first byte": ("__0_0.distcp", lambda path: flip(path, 0.0), r"__0_0\.distcp is damaged"),
    "a tensor": ("__0_0.distcp", flip, r"__0_0\.distcp is damaged"),
    "last byte": ("__0_0.distcp", lambda path: flip(path, 1.0), r"__0_0\.distcp is damaged"),
    "truncated": ("__0_0.distcp", truncate, r"__0_0\.distcp has \d+ bytes, not \d+"),
    "missing shard": ("__0_0.distcp", Path.unlink, r"__0_0\.distcp is missing"),
    "empty shard": ("__0_0.distcp", lambda path: os.truncate(path, 0), r"__0_0\.distcp has 0 bytes, not \d+"),
    "state": ("state.json", flip, r"state\.json is damaged"),
    "layout": (".metadata", flip, r"\.metadata is damaged"),
    "no manifest": (MANIFEST, Path.unlink, r"manifest\.json is missing"),
    "torn manifest": (MANIFEST, lambda path: os.truncate(path, 20), r"manifest\.json cannot be read"),
    "another manifest": (MANIFEST, lambda path: write_whole(path, "[1]"), r"manifest\.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    two: Path, tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file, harm, told = DAMAGES[damage]
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    assert newest_sound(folder, world) == folder / "step_000002"
    harm(folder / "step_000002" / file)
    assert newest_sound(folder, world) == folder / "step_000001"
    pattern = rf"not used: .*step_000002: .*{told}.* Going on from .*step_000001 instead"
    assert [r.levelname for r in caplog.records if re.search(pattern, r.message)] == ["WARNING"]
    shutil.rmtree(folder / "step_000001")
    with pytest.raises(CheckpointError, match=rf"no checkpoint can be used: .*step_000002: {told}.*Put back a copy"):
        newest_sound(folder, world)


def test_a_flipped_byte_would_be_loaded_without_the_manifest(two: Path, tmp_path: Path, trained: Learner) -> None:
    """Why there is one: torch reads such a checkpoint without a word."""
    path = tmp_path / "step_000002"
    shutil.copytree(two / "step_000002", path)
    file, parameter = path / "__0_0.distcp", dict(trained.policy.named_parameters())[QUERY].detach()
    before, data = parameter.clone(), bytearray(file.read_bytes())
    data[data.index(before.numpy().tobytes()) + 3] ^= 0x40  # in the exponent of the first number
    file.write_bytes(data)
    load_checkpoint(path, trained)
    assert (parameter != before).nonzero().tolist() == [[0, 0]]
    load_checkpoint(two / "step_000002", trained)


def test_where_no_checkpoint_was_written_there_is_none(tmp_path: Path, world: World) -> None:
    assert newest_sound(tmp_path, world) is None


def test_pruning_spares_what_it_goes_on_from_when_a_newer_one_is_damaged(
    trained: Learner, tmp_path: Path, world: World
) -> None:
    write(trained, tmp_path, (10, 20), world)
    flip(tmp_path / "step_000020" / "__0_0.distcp")
    write(trained, tmp_path, (15,), world, keep=1)
    assert newest_sound(tmp_path, world) == tmp_path / "step_000015"
    write(trained, tmp_path, (20,), world, keep=2)  # takes the place of the damaged one
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000015", "step_000020"]
    assert newest_sound(tmp_path, world) == tmp_path / "step_000020"
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("size", [0, 300, 3000, 100_000], ids=["nothing fits", "no state", "no layout", "no tensors"])
def test_a_disk_that_is_full_while_a_checkpoint_is_written_leaves_the_last_one(
    trained: Learner, tmp_path: Path, world: World, size: int
) -> None:
    with full_disk(size), pytest.raises(OutputError, match=r"step_000001: the checkpoint cannot .*none before it"):
        write(trained, tmp_path, (1,), world)
    write(trained, tmp_path, (1,), world)
    with (
        full_disk(size),
        pytest.raises(
            OutputError, match=r"step_000002: .*rank 0: .*\(\d+ MiB are free there\)\. step_000001 is untouched"
        ),
    ):
        write(trained, tmp_path, (2,), world, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert newest_sound(tmp_path, world) == tmp_path / "step_000001"
    write(trained, tmp_path, (2,), world, keep=1)  # there is room again
    assert newest_sound(tmp_path, world) == tmp_path / "step_000002"


def test_other_files_that_the_disk_does_not_take_are_named(
    trained: Learner, tmp_path: Path, world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "whole.json").write_text("old")
    report = write_report(make_run(tmp_path / "run", [evaluation(0, math=0.5)], {1: [case()]}))
    earlier = report.read_bytes()
    with full_disk(100):
        with pytest.raises(OutputError, match=r"dump\.jsonl: cannot be written \(File too large\)"):
            dump_episodes(tmp_path / "dump.jsonl", [episode([0, 1])])
        with pytest.raises(OutputError, match=r"whole\.json: cannot be written"):
            write_whole(tmp_path / "whole.json", "new" * 100)
        with pytest.raises(OutputError, match=r"model: cannot be written"):
            export_model(tmp_path / "model", trained.policy, tokenizer, world)
        with pytest.raises(OutputError, match=r"report\.html: cannot be written \(File too large\)"):
            write_report(tmp_path / "run")
    assert report.read_bytes() == earlier
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".writing")]
    assert (tmp_path / "whole.json").read_text() == "old"
    assert not (tmp_path / "dump.jsonl").exists()


def finish(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status, and what was said on standard error."""
    capsys.readouterr()
    return main(arguments), capsys.readouterr().err


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_a_run_resumed_from_the_checkpoint_before_a_damaged_one_equals_the_uninterrupted(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = train_on_dumps(model_folder, tmp_path, [], 6)
    assert main(arguments) == 0
    runs = tmp_path / "runs"
    whole = AutoModelForCausalLM.from_pretrained(runs / "latest" / "model").state_dict()
    assert main([*arguments, "--run.steps=4", "--run.checkpoint_every=2"]) == 0
    run = (runs / "latest").resolve()
    flip(run / "checkpoints" / "step_000004" / "__0_0.distcp")
    resume = ["--resume", str(run), "--run.steps=6"]
    assert main(resume) == 0
    assert f"Going on from {run}/checkpoints/step_000002 instead" in caplog.text
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    again = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    torch.testing.assert_close(again, whole, rtol=0, atol=0)

    for path in checkpoints(run / "checkpoints"):
        flip(path / "state.json")
    before = (run / "metrics.jsonl").read_bytes()
    status, said = finish([*resume, "--run.steps=8"], capsys)
    assert status == 2
    assert len(errors(said)) == 1
    assert "no checkpoint can be used" in said
    shutil.rmtree(run / "checkpoints")
    status, said = finish([*resume, "--run.checkpoint_every=2", "--run.steps=8"], capsys)
    assert status == 2
    assert "there is no checkpoint, although 6 steps are done" in said
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_on_a_disk_that_fills_up_ends_with_the_files_name_and_goes_on_later(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*train_on_dumps(model_folder, tmp_path, [], 8), "--run.checkpoint_every=2"]
    with full_disk(150_000):  # metrics fit, a checkpoint does not
        status, said = finish(arguments, capsys)
    run = (tmp_path / "runs" / "latest").resolve()
    assert status == 1
    assert len(errors(said)) == 1
    assert f"{run}/checkpoints/step_000002: the checkpoint cannot be written" in said
    assert main(["--resume", str(run), "--run.steps=4"]) == 0
    size = (run / "metrics.jsonl").stat().st_size
    with full_disk(size + 100):  # the next line is torn
        status, said = finish(["--resume", str(run), "--run.steps=8"], capsys)
    assert status == 1
    assert errors(said) == [line for line in errors(said) if f"{run}/metrics.jsonl: cannot be written" in line]
    assert main(["--resume", str(run), "--run.steps=8"]) == 0
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, 9))
