"""How the policy's weights travel to the servers as files or over HTTP; `group.py` has the third way.

Every way sends the same buckets of (name, tensor), full tensors under transformers' parameter names. `Copy` is also
what a lost server is restored from.
"""

from __future__ import annotations

import base64
import fcntl
import io
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.client import Client

Bucket = list[tuple[str, Tensor]]
SHARED_MEMORY = Path("/dev/shm")
PREFIX, OWNER = "mel_fast-", "owner"


def buckets(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, size: int) -> Iterator[tuple[Bucket, bool]]:
    """Tensors of `dtype` in lists of about `size` bytes, each with whether it is the last."""
    held: Bucket = []
    full: Bucket | None = None
    filled = 0
    for name, tensor in weights:
        if held and filled + tensor.numel() * dtype.itemsize > size:
            if full is not None:
                yield full, False
            full, held, filled = held, [], 0
        held.append((name, tensor.detach().to(dtype).contiguous()))
        filled += tensor.numel() * dtype.itemsize
    if full is not None:
        yield full, False
    yield held, True


class Copy:
    """The newest weights as safetensors, one file for each bucket, in a folder for each version.

    Args:
        parent: of its own fresh folder, which `close` removes. Those that killed runs have left there go first.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_ownerless(parent)
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._owner = _own(self.root)
        self.path: Path | None = None  # of the newest whole copy
        self._writing: Path | None = None

    def add(self, bucket: Bucket, version: int) -> None:
        """Raises EngineError when there is no room."""
        if self._writing is None:
            self._writing = self.root / str(version)
            shutil.rmtree(self._writing, ignore_errors=True)
            self._writing.mkdir(parents=True)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
        if shutil.disk_usage(self.root).free < size:
            raise EngineError(
                f"no room for the weights in {self.root}: name a larger folder in rollout.sglang.weights_folder"
            )
        number = len(list(self._writing.iterdir()))
        tensors = {name: tensor.cpu() for name, tensor in bucket}
        save_file(tensors, self._writing / f"model-{number:05d}.safetensors", metadata={"format": "pt"})

    def finish(self) -> Path:
        """The copy is whole. The one before stays until `drop_older`: servers may still be reading it."""
        assert self._writing is not None
        self.path, self._writing = self._writing, None
        return self.path

    def drop_older(self) -> None:
        for folder in self.root.iterdir():
            if folder.is_dir() and folder != self.path:
                shutil.rmtree(folder)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        assert self.path is not None
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                    yield name, tensors.get_tensor(name)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self._owner.close()


def choose_parent(named: str | None, run_folder: Path, model_bytes: int) -> Path:
    """The folder named, else shared memory when two copies fit there, else beside the run's files."""
    if named is not None:
        return Path(named)
    if SHARED_MEMORY.is_dir():
        _remove_ownerless(SHARED_MEMORY)  # before its room is measured
        if shutil.disk_usage(SHARED_MEMORY).free > 2.2 * model_bytes:
            return SHARED_MEMORY
    return run_folder


def _own(folder: Path) -> IO[bytes]:
    """Holds a lock in the folder, which the system gives up when this process has ended, however that was.

    A process number would not do: whoever shares the folder from another host or container could not ask for it.
    """
    file = (folder / f"new-{OWNER}").open("wb")
    with suppress(OSError):  # a file system without locks: then nobody takes the folder for left
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(file.name).rename(folder / OWNER)  # only now: a file of that name that is not locked has no owner
    return file


def _remove_ownerless(parent: Path) -> None:
    for file in parent.glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError), file.open("rb+") as lock:  # it is locked, another user's, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent)


async def send_files(client: Client, folder: Path, version: int, timeout_s: float) -> None:
    await client.post(
        "/update_weights_from_disk", timeout_s, model_path=str(folder), weight_version=str(version), flush_cache=True
    )


async def send_tensors(client: Client, payload: str, tp: int, version: int | None, timeout_s: float) -> None:
    """One bucket, `serialised`. `version` goes with the last one, which also flushes the prefix cache."""
    last: dict[str, Any] = {} if version is None else {"weight_version": str(version)}
    await client.post(
        "/update_weights_from_tensor",
        timeout_s,
        serialized_named_tensors=[payload] * tp,
        flush_cache=version is not None,
        **last,
    )


def serialised(bucket: Bucket) -> str:
    """CPU tensors by value; CUDA tensors as IPC handles, so the bucket must live until the server has read it."""
    buffer = io.BytesIO()
    pickler = _HandlePickler(buffer) if bucket and bucket[0][1].is_cuda else pickle.Pickler(buffer)
    pickler.dump(bucket)
    return base64.b64encode(buffer.getvalue()).decode()


class _HandlePickler(ForkingPickler):
    """CUDA tensors as IPC handles that name the GPU by its UUID: device numbers differ between processes."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.is_cuda:
            rebuild, arguments = cast("tuple[Any, tuple[Any, ...]]", reduce_tensor(obj))
            assert rebuild is rebuild_cuda_tensor
            device = 6  # its place among rebuild_cuda_tensor's arguments
            uuid = str(torch.cuda.get_device_properties(arguments[device]).uuid)
            return rebuild, (*arguments[:device], uuid, *arguments[device + 1 :])
        return NotImplemented
