"""File locks that decide who may work on a shard root.

They are locks of the kernel (flock), so they end with the process that has them, also after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from framestream.tools.common.errors import BuildError

LOCK_FILES = ("build.lock", "step.lock")  #: files that are locked; they exist while a build runs, or after a kill


@contextlib.contextmanager
def lock_root(root: Path, shared: bool) -> Iterator[None]:
    """Lock ``root`` against other builds, and create it if it is missing. Folders that stay empty are removed.

    Args:
        shared: allow other machines of the same build.

    Raises:
        BuildError: the folder cannot be created, or another build has locked it.
    """
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{root}: cannot be created ({error.strerror}); give another --out") from None
    try:
        with _locked(root, "build.lock", (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
            try:
                yield
            finally:
                if not (root / "work").exists():
                    for name in LOCK_FILES:
                        (root / name).unlink(missing_ok=True)
    except BlockingIOError:
        raise BuildError(f"{root}: another build is running here; wait for it, or stop it") from None
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def lock_step(root: Path) -> Iterator[None]:
    """Wait for, and take, the lock of the steps that only one machine at a time may run: planning and finishing."""
    with _locked(root, "step.lock", fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(root: Path, name: str, operation: int) -> Iterator[None]:
    with open(root / name, "w") as file:
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            raise BuildError(f"{root}: its file system does not support file locks; mount it with flock") from None
        yield
