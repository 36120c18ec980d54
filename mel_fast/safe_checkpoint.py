"""Reading the tensors of a checkpoint without running what may be hidden in it.

DCP keeps the index of a checkpoint, `.metadata`, and all values that are no tensors (an optimizer's settings) as
pickles, and a pickle calls whatever it names. Here the index may name only what DCP puts there, and values are read as
PyTorch reads the weights of strangers (`weights_only`), as DCP does with tensors.
"""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from mel_fast.distributed import World
from mel_fast.errors import InputError

INDEX = ".metadata"
ADMITTED = {
    "pathlib": {"PosixPath"},  # where the checkpoint was written
    "pathlib._local": {"PosixPath"},  # the same, by Python 3.13
    "torch": {"Size"},  # and dtypes
    "torch.serialization": {"_get_layout"},  # looks a name up
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What an index may name, by module. All of it holds data; none runs anything with them."""

_ADVICE = "Put back a copy that a run of yours wrote, or start a new run without --resume"


class CheckpointError(InputError):
    """A checkpoint that cannot be used, with its path and what to do."""


def load_tensors(path: Path, tensors: dict[str, Any], world: World) -> None:
    """Fills a nested dictionary of tensors and plain values in place from the checkpoint at `path`. Collective.

    Raises:
        CheckpointError: on every rank, when one cannot read it, or when it holds anything but tensors and plain values.
            Nothing of it has run; some tensors may have been filled.
    """
    index, told = None, ""
    if world.main:
        try:
            index = read_index(path / INDEX)
        except CheckpointError as error:
            told = str(error)
    index, told = world.broadcast((index, told))
    if index is None:
        raise CheckpointError(told)
    try:
        state_dict_loader.load(tensors, storage_reader=_Reader(path, index), planner=_Planner())
    except CheckpointException as error:  # of any rank, on every rank
        reason, _ = next(iter(error.failures.values()))
        if isinstance(reason, CheckpointError):
            raise reason from None
        raise CheckpointError(_unreadable(path, reason)) from error


def read_index(path: Path) -> Metadata:
    """What is where in a checkpoint.

    Raises:
        CheckpointError: the file names what has no place in an index, or is none.
    """
    try:
        with path.open("rb") as file:
            index = _Unpickler(file, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # what is no pickle may raise anything
        raise CheckpointError(_unreadable(path, error)) from error
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path}: not the index of a checkpoint, but a {type(index).__name__}. {_ADVICE}")
    return index


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._member
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in ADMITTED.get(module, ()):
            raise CheckpointError(_refused(self._path, f"{module}.{name}"))
        return super().find_class(module.removesuffix("._local"), name)

    def _member(self, kind: Any, name: str) -> Any:
        """In getattr's place: by it, the first releases of Python 3.11 pickle the members of an enumeration."""
        if kind is not _MEM_FORMAT_ENCODING:
            raise CheckpointError(_refused(self._path, "builtins.getattr"))
        return kind[name]


class _Reader(FileSystemReader):
    """Of a checkpoint whose index has been read."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self._folder, self._index = path, index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """File by file, to tell which one holds what it must not."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            try:
                super().read_data(replace(plan, items=items), planner).wait()
            except pickle.UnpicklingError as error:  # torch's words for it advise to drop all caution
                found = re.search(r"GLOBAL (\S+)", str(error))
                raise CheckpointError(_refused(self._folder / name, found[1] if found else "an odd pickle")) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()  # DCP puts the value in its place, but reads it without caution: it gets what is safe
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _refused(path: Path, what: str) -> str:
    return f"{path}: refused, it holds {what}, where only tensors and plain values belong; nothing was run. {_ADVICE}"


def _unreadable(path: Path, error: BaseException) -> str:
    return f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]}). {_ADVICE}"
