"""Write files that are either complete or absent: to a temporary file, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing so that it appears under its name only when the block ends without an error.

    The bytes go to ``path`` + ``.tmp``, which replaces ``path`` at the end and is removed on an error. A process that
    is killed leaves at most the ``.tmp`` file, which the next writer overwrites.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` completely or not at all; see :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def file_sha256(path: str | Path) -> bytes:
    """Return the SHA-256 of a file, which is read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def fsync_path(path: str | Path) -> None:
    """Flush a file, or the renames inside a folder, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
