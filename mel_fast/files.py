"""Files of a run: replaced whole, sealed by a manifest, and one clear error when the disk does not take them.

A seal is `manifest.json`: size and CRC-32 of every file beside it, written last. CRC-32 finds every single flipped byte
and, by chance, misses one in four thousand million of other damages; zlib computes it faster than disks read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mel_fast.errors import OutputError

if TYPE_CHECKING:
    from mel_fast.distributed import World

MANIFEST = "manifest.json"
BLOCK = 1 << 24  # bytes read at once


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises OutputError, naming `path`, in place of an OSError inside."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path}: cannot be written ({reason}); give it room or rights, then go on (a run goes on with --resume)"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: a run that is killed here leaves the old one or the new one, never half of it.

    Raises:
        OutputError: the disk does not take it; the old one is still there.
    """
    partial = path.with_name(f".writing_{path.name}")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # it must not keep the room that is lacking
            raise


def settle(folder: Path) -> None:
    """Makes names in a folder survive a power failure, as fsync does for what is in a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, world: World) -> None:
    """Writes the manifest of a folder's files. Collective: each rank reads its share of them.

    Raises:
        OutputError: a file cannot be read back, or the manifest not be written, on any rank.
    """
    names = world.broadcast(sorted(path.name for path in folder.iterdir()) if world.main else None)
    sums: dict[str, list[int]] = {}
    with world.together(), writing(folder):
        sums = {name: [(folder / name).stat().st_size, _crc(folder / name)] for name in names[world.rank :: world.size]}
    shares = world.gather(sums)
    with world.together():
        if world.main:
            write_whole(folder / MANIFEST, json.dumps({k: v for share in shares for k, v in share.items()}, indent=1))
            settle(folder)


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with a sealed folder, the same on every rank; None if every byte is as it was. Collective: each
    rank reads its share."""
    manifest, told = {}, None
    if world.main:
        try:
            manifest = {str(k): (int(size), int(crc)) for k, (size, crc) in _read(folder / MANIFEST).items()}
        except FileNotFoundError:
            told = f"{MANIFEST} is missing: it was cut off while it was written, or is not of this version"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            told = f"{MANIFEST} cannot be read ({error})"
    manifest, told = world.broadcast((manifest, told))
    names = sorted(manifest)[world.rank :: world.size] if told is None else []
    found = [told, *(_damage(folder / name, *manifest[name]) for name in names)]
    everywhere = [one for share in world.gather(found) for one in share if one]
    return min(everywhere, default=None)


def _read(path: Path) -> dict[str, tuple[int, int]]:
    return json.loads(path.read_text(encoding="utf-8"))


def _damage(path: Path, size: int, crc: int) -> str | None:
    try:
        if (there := path.stat().st_size) != size:
            return f"{path.name} has {there} bytes, not {size}"
        return None if _crc(path) == crc else f"{path.name} is damaged (its CRC-32 differs from that in {MANIFEST})"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc
