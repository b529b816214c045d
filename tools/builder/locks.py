"""Who may work on a shard root: locks of the kernel, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from framestream.tools.common.errors import BuildError

LOCKS = ("build.lock", "step.lock")  #: files that are locked; there while a build is at work, or after a kill


@contextlib.contextmanager
def lock_root(root: Path, shared: bool) -> Iterator[None]:
    """Hold ``root``, created where missing, against other builds; folders that stay empty are removed.

    Args:
        shared: with other machines of the same build; else alone.

    Raises:
        BuildError: the folder cannot be made, or another build holds it.
    """
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{root}: cannot be made ({error.strerror}); give another --out") from None
    try:
        with _locked(root, "build.lock", (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
            try:
                yield
            finally:
                if not (root / "work").exists():
                    for name in LOCKS:
                        (root / name).unlink(missing_ok=True)
    except BlockingIOError:
        raise BuildError(f"{root}: another build is at work here; wait for it, or stop it") from None
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def lock_step(root: Path) -> Iterator[None]:
    """Hold the steps that one machine at a time may take, planning and finishing; waits for the one that does."""
    with _locked(root, "step.lock", fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _locked(root: Path, name: str, how: int) -> Iterator[None]:
    with open(root / name, "w") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            raise BuildError(f"{root}: its file system has no file locks; mount it with them (flock)") from None
        yield
