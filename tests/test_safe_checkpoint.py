"""Checkpoints made by somebody else: tensors and plain values are read, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from curves import SCRIPT, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from mel_kernels import LossConfig
from support import random_samples, torchrun
from test_learner import learner
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from mel_fast.checkpoint import CheckpointError, load_checkpoint, newest_sound, save_checkpoint
from mel_fast.distributed import World
from mel_fast.files import MANIFEST, seal
from mel_fast.learner import Learner
from mel_fast.safe_checkpoint import INDEX, read_index

ALONE = World(0, 1, torch.device("cpu"))
SHARD = "__0_0.distcp"


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class Method(Trap):
    """The same, by the method of a path."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.folder.mkdir, ()


def dotted(folder: Path) -> bytes:
    """A pickle that reaches os.mkdir through a module whose classes an index may name."""
    words = ("torch.distributed.checkpoint.metadata", "os.mkdir", str(folder))
    module, name, argument = (b"\x8c" + bytes([len(word)]) + word.encode() for word in words)
    return b"\x80\x04" + module + name + b"\x93" + argument + b"\x85R."  # STACK_GLOBAL, TUPLE1, REDUCE


def put(path: Path, key: str, value: object) -> None:
    """Puts a value in the place of another, as somebody would who knows the format."""
    index = pickle.loads((path / INDEX).read_bytes())
    saved = io.BytesIO()
    torch.save(value, saved)
    place = next(place for place in index.storage_data if place.fqn == key)
    info = replace(index.storage_data[place], offset=(path / SHARD).stat().st_size, length=saved.tell())
    index.storage_data[place] = info
    with (path / SHARD).open("ab") as file:
        file.write(saved.getvalue())
    (path / INDEX).write_bytes(pickle.dumps(index))


def index_with(path: Path, trap: Trap) -> None:
    index = pickle.loads((path / INDEX).read_bytes())
    index.planner_data["x"] = trap
    (path / INDEX).write_bytes(pickle.dumps(index))


MOMENT = "optimizer.state.model.model.norm.weight.exp_avg"
HIDDEN: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "in the index": (lambda path, folder: index_with(path, Trap(folder)), INDEX, r"posix\.mkdir"),
    "as a method": (lambda path, folder: index_with(path, Method(folder)), INDEX, r"builtins\.getattr"),
    "behind a module's name": (
        lambda path, folder: (path / INDEX).write_bytes(dotted(folder)),
        INDEX,
        r"torch\.distributed\.checkpoint\.metadata\.os\.mkdir",
    ),
    "in a value": (lambda path, folder: put(path, "optimizer.param_groups.0.lr", Trap(folder)), SHARD, r"posix\.mkdir"),
    "in a moment": (lambda path, folder: put(path, MOMENT, Trap(folder)), SHARD, r"posix\.mkdir"),
}


@pytest.fixture(scope="module")
def trained(model_folder: Path) -> Learner:
    result = learner(model_folder, ALONE)
    result.update([random_samples(400)], LossConfig())
    return result


@pytest.fixture(scope="module")
def sound(trained: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints"), 1, trained, {}, 2, ALONE)


def hostile(sound: Path, folder: Path, place: str) -> tuple[Path, Path]:
    """A checkpoint with a trap and a manifest in order, and the folder that the trap makes."""
    path, made = folder / "checkpoints" / sound.name, folder / "made"
    shutil.copytree(sound, path)
    HIDDEN[place][0](path, made)
    (path / MANIFEST).unlink()
    seal(path, ALONE)
    return path, made


@pytest.mark.parametrize("place", HIDDEN)
def test_code_in_a_checkpoint_is_refused_and_does_not_run(
    sound: Path, trained: Learner, tmp_path: Path, place: str
) -> None:
    path, made = hostile(sound, tmp_path, place)
    _, file, named = HIDDEN[place]
    assert newest_sound(path.parent, ALONE) == path  # a manifest vouches for bytes, not for who wrote them
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(f'{path}/{file}')}: refused, it holds {named}, .*Put back"
    ):
        load_checkpoint(path, trained)
    assert not made.exists()


@pytest.mark.parametrize("place", ["in the index", "as a method", "behind a module's name", "in a value"])
def test_torchs_own_reader_would_run_it(sound: Path, trained: Learner, tmp_path: Path, place: str) -> None:
    """Why there is another."""
    path, made = hostile(sound, tmp_path, place)
    with suppress(CheckpointException):
        tensors = {"optimizer": get_optimizer_state_dict(trained.policy, trained.optimizer)}
        state_dict_loader.load(tensors, checkpoint_id=path)
    assert made.is_dir()


class Older(pickle.Pickler):
    """Python 3.11.2, in what it makes of enumerations."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_an_index_of_another_release_of_python_is_read(sound: Path, tmp_path: Path) -> None:
    index = read_index(sound / INDEX)
    with (tmp_path / INDEX).open("wb") as file:
        Older(file).dump(index)
    assert b"getattr" in (tmp_path / INDEX).read_bytes()
    assert read_index(tmp_path / INDEX) == index


def test_every_rank_refuses_it(sound: Path, model_folder: Path, tmp_path: Path) -> None:
    path, made = hostile(sound, tmp_path, "in a value")
    cases = {"all": asdict(Case(str(model_folder), load=str(path.parent)))}
    ended = torchrun(2, SCRIPT, json.dumps(cases), str(tmp_path / "out.json"))
    assert ended.returncode != 0
    assert len(re.findall(rf"CheckpointError: {re.escape(f'{path}/{SHARD}')}: refused, it holds", ended.stderr)) == 2
    assert not made.exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([INDEX, SHARD]), st.floats(0, 1), st.integers(1, 255), st.booleans())
def test_a_damaged_one_is_read_or_refused(
    sound: Path, trained: Learner, tmp_path_factory: pytest.TempPathFactory, file: str, place: float, by: int, cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    shutil.copytree(sound, path, dirs_exist_ok=True)
    data = bytearray((path / file).read_bytes())
    at = int(place * (len(data) - 1))
    data[at] ^= by
    (path / file).write_bytes(data[: at + 1] if cut else data)
    told = str(path)
    try:
        load_checkpoint(path, trained)
    except CheckpointError as error:
        told = str(error)
    assert str(path) in told
    assert "\n" not in told
