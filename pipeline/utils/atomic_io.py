"""Write files that are either complete or absent: to a temporary file, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: errors of fsync on a file system that has no such call, and of folders that may be written but not read
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing so that it appears under its name only when the block ends without an error.

    The bytes go to ``path`` + ``.tmp``, which replaces ``path`` at the end and is removed on an error. A process that
    is killed leaves at most the ``.tmp`` file, which the next writer overwrites. Errors of the file system name the
    file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file, errors_at(temporary):
            yield file
            file.flush()
            fsync(file.fileno(), temporary)
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


@contextlib.contextmanager
def errors_at(path: str | Path) -> Iterator[None]:
    """Give errors of the file system that come without a file name, such as those of writing, the name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def fsync(handle: int, path: str | Path) -> None:
    """Flush the open file ``handle`` to the disk. Go on where the file system has no such call.

    Raises:
        OSError: the disk is full or broken; it names ``path``.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            error.filename = str(path)
            raise


def fsync_path(path: str | Path) -> None:
    """Flush a file, or the renames inside a folder, to the disk, so that they survive a power cut.

    A folder that cannot be opened or flushed is left to the file system: its renames are valid, only later on the disk.

    Raises:
        OSError: the disk is full or broken; it names ``path``.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not os.path.isdir(path):
            raise
        return
    try:
        fsync(handle, path)
    finally:
        os.close(handle)
