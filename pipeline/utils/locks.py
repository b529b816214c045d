"""Locks that decide who may work in a folder: a build in its shard root, a run in its output.

They are locks of the kernel (flock) on a file in the folder, so they end with the process that has them, also after a
kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

MAX_OWNER_BYTES = 300  #: of a lock file that are read

#: errors of flock on a file system without locks, such as Lustre without its mount option ``flock``
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class LockError(RuntimeError):
    """A folder cannot be locked. The message is one line with the folder, the reason and the fix."""


class LocksUnsupportedError(LockError):
    """The folder's file system has no locks."""


class LockHeldError(LockError):
    """Another process has the lock."""


@contextlib.contextmanager
def lock_folder(folder: Path, name: str, kind: str, shared: bool = False) -> Iterator[None]:
    """Create ``folder`` if it is missing, and lock its file ``name``. Folders that stay empty are removed.

    Args:
        kind: what works in the folder, such as ``build``, for the error.
        shared: allow others who lock it as shared.

    Raises:
        LockError: the folder cannot be created or written, or another process has locked it.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fault = "is a file" if isinstance(error, FileExistsError) else f"cannot be created ({error.strerror})"
        raise LockError(f"{folder}: {fault}; choose another folder") from None
    try:
        with lock_file(folder / name, kind, shared):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()


@contextlib.contextmanager
def lock_file(path: Path, kind: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Lock the file ``path``, which is created. Remove it inside the block if it shall not stay.

    Args:
        kind: what works in the file's folder, for the error.
        shared: allow others who lock it as shared.
        wait: wait until the lock is free. A signal whose handler raises ends the wait.

    Raises:
        LockError: the file cannot be written.
        LockHeldError: another process has locked it. The file says which process.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(open(path, "a"))
            except OSError as error:
                raise LockError(f"{path.parent}: cannot be written ({error.strerror}); choose another folder") from None
            try:
                fcntl.flock(file, operation)
            except BlockingIOError:
                raise LockHeldError(
                    f"{path.parent}: another {kind} is running here{_owner(path)}; wait for it, or stop it"
                ) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise LockError(f"{path}: cannot be locked ({error.strerror}); choose another folder") from None
                fault = "its file system does not support file locks"
                message = f"{path.parent}: {fault}; mount it with flock, or use another one"
                raise LocksUnsupportedError(message) from None
            if _is_at(file.fileno(), path):  # else it was removed by the process that had the lock
                break
            file.close()
        if not shared:
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def _owner(path: Path) -> str:
    """Return process and host of who has the lock, in parentheses; empty if the file does not say."""
    try:
        text = path.read_bytes()[:MAX_OWNER_BYTES].decode()
    except (OSError, ValueError):
        return ""
    found = re.fullmatch(r"process \d+ on \S+", text.strip())
    return f" ({found[0]})" if found else ""


def _is_at(handle: int, path: Path) -> bool:
    """Return whether the open file ``handle`` is the one that ``path`` names."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
