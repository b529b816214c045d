"""A disk cache of fetched files, bounded in bytes, which any number of processes and machines may share.

There are no locks. A cached file, or the files of a folder of frames, appear as a folder by one rename, under a name
that is made of where they came from and what they hold, and are never changed. They are used through hard links in the
user's scratch folder, so that evicting them takes nothing away from anybody. What was used longest ago (modification
time of the folder, which use renews) goes first. Scratch folders of processes that are gone are removed when a cache
is opened::

    FOLDER/files/ab/abcdef.../   one cached file, or the files of one folder
    FOLDER/scratch/HOST-PID-.../ scratch folders, and what is on its way in or out
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.tools.fetch.base import MediaSource

ABANDONED = 24 * 3600  #: seconds after which the scratch folder of another machine counts as left behind
SLACK = 256  #: the cache is measured again after one process has added a SLACK-th of its bound
LOW = 7 / 8  #: share of the bound that is left when something has to go, so that others may add meanwhile
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  #: copying works where these occur


class DiskFullError(OSError):
    """No space is left: one line with the fix."""


def is_disk_full(error: Exception) -> bool:
    """Whether no space is left."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in FULL)


@contextlib.contextmanager
def disk_full_at(folder: Path) -> Iterator[None]:
    """Lack of space in the block becomes a DiskFull that names ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFullError(f"{folder}: no space left on the disk; free some and repeat the command") from None


@dataclass(frozen=True, slots=True)
class _Kept:
    path: Path
    size: int
    used: float


class DiskCache:
    """A cache below ``folder`` of at most ``bound`` bytes, 0 for none.

    Between two measurements other processes may exceed the bound by what they add, each by a 256th of it or one file;
    beyond it there is what is in scratch folders, the files that each process has fetched and not yet used.
    """

    def __init__(self, folder: str | Path, bound: int) -> None:
        self._files, self._scratch = Path(folder) / "files", Path(folder) / "scratch"
        self.max_bytes = bound
        self._added = bound  # so that the first addition measures
        self._files.mkdir(parents=True, exist_ok=True)
        self._scratch.mkdir(exist_ok=True)
        self._prefix = f"{_machine()}-{os.getpid()}-"
        self.remove_abandoned()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder that is removed at the end, or later if the process is killed."""
        folder = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self._scratch))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def get(self, key: str, scratch: Path, tree: bool = False) -> Path | None:
        """What is kept for ``key``, in ``scratch``: a file, or with ``tree`` a folder of files; None if nothing is."""
        target = scratch / "kept"
        target.mkdir()
        names = self._link(self._path(key), target)
        if names and (tree or len(names) == 1):
            return target if tree else target / names[0]
        shutil.rmtree(target)
        return None

    def put(self, key: str, path: Path) -> None:
        """Keep ``path``, a file or a folder of files in a scratch folder, for ``key``; nothing happens where it is too
        large or the disk is full."""
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        kept = self._path(key)
        if not self.max_bytes or size > self.max_bytes or kept.exists():
            return
        self._added += size
        if self._added > self.max_bytes // SLACK:
            self._measure(size)
        try:
            self._insert(files, kept)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def trim(self) -> int:
        """Evict until the bound holds, whatever others have added; returns the bytes that are kept."""
        return self._measure(0)

    def clear(self) -> None:
        """Evict everything."""
        for item in self._kept():
            self._evict(item.path)

    def remove_abandoned(self) -> None:
        """Remove scratch folders of processes of this machine that are gone, and any that are a day old."""
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix=self._prefix) as probe:
            now = os.stat(probe.name).st_mtime  # the file system's own clock
        for item in list(os.scandir(self._scratch)):
            machine, _, process = item.name.rpartition("-")[0].rpartition("-")
            with contextlib.suppress(FileNotFoundError):
                gone = machine == _machine() and process.isdigit() and not _alive(int(process))
                if gone or now - item.stat(follow_symlinks=False).st_mtime > ABANDONED:
                    _remove(Path(item.path))

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self._files / name[:2] / name

    def _link(self, kept: Path, target: Path) -> list[str]:
        """Make ``target`` hold the files of ``kept``; their names, or nothing if it is not there any more."""
        try:
            handle = os.open(kept, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return []
        try:
            names = sorted(os.listdir(handle))
            for name in names:
                _place(kept / name, target / name)
            os.utime(kept)
            # Evicted in between, it would lie elsewhere now, and the names may be a part of them only.
            return names if os.stat(kept).st_ino == os.fstat(handle).st_ino else []
        except FileNotFoundError:
            return []
        finally:
            os.close(handle)

    def _insert(self, files: list[Path], kept: Path) -> None:
        kept.parent.mkdir(exist_ok=True)
        with self.scratch() as scratch:
            ready = scratch / "ready"
            ready.mkdir()
            for file in files:
                _place(file, ready / file.name)
                fsync_path(ready / file.name)
            try:
                os.rename(ready, kept)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process has put the same there
                    raise

    def _measure(self, coming: int) -> int:
        """Bytes kept, after evicting if ``coming`` bytes more would exceed the bound."""
        self._added = coming
        kept = self._kept()
        total = sum(item.size for item in kept)
        if total + coming > self.max_bytes:
            for item in sorted(kept, key=lambda item: item.used):
                if total <= LOW * self.max_bytes - coming:
                    break
                self._evict(item.path)
                total -= item.size
        return total

    def _kept(self) -> list[_Kept]:
        found = []
        for shelf in list(os.scandir(self._files)):
            for item in list(os.scandir(shelf)):
                with contextlib.suppress(FileNotFoundError):
                    size = sum(file.stat().st_size for file in list(os.scandir(item)))
                    found.append(_Kept(Path(item.path), size, item.stat().st_mtime))
        return found

    def _evict(self, path: Path) -> None:
        """Take ``path`` away at once, by a rename, so that nobody finds a part of it."""
        with contextlib.suppress(FileNotFoundError), self.scratch() as scratch:
            os.rename(path, scratch / "gone")


class CachedSource:
    """A source whose files are kept in a cache (see ``framestream.tools.fetch.base.Source``).

    A file that several threads ask for at once is fetched by one of them, whose failure is also that of the others.
    """

    def __init__(self, source: MediaSource, cache: DiskCache) -> None:
        self.origin = source.origin
        self._source, self._cache = source, cache
        self._coming: dict[str, Future[None]] = {}  # by key
        self._lock = threading.Lock()

    def find(self, path: str, tree: bool = False) -> int | None:
        """As the source says."""
        return self._source.find(path, tree)

    def identity(self, path: str, tree: bool = False) -> str:
        """As the source says."""
        return self._source.identity(path, tree)

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """From the cache, or else from the source. ``scratch`` should be the cache's, on its file system.

        Raises:
            DiskFull: even with nothing in the cache.
        """
        if not self._cache.max_bytes:
            return self._fetch(path, scratch, tree)
        key = "\0".join((self.origin, self._source.identity(path, tree), path, "tree" if tree else "file"))
        with self._lock:
            coming = self._coming.get(key)
            if coming is None:
                mine = self._coming[key] = Future()
        if coming:
            coming.result()
            return self._take(key, path, scratch, tree)
        try:
            found = self._take(key, path, scratch, tree)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._coming[key]
        mine.set_result(None)
        return found

    def _take(self, key: str, path: str, scratch: Path, tree: bool) -> Path:
        found = self._cache.get(key, scratch, tree)
        if found is None:
            found = self._fetch(path, scratch, tree)
            if found.is_relative_to(scratch):
                self._cache.put(key, found)
        return found

    def _fetch(self, path: str, scratch: Path, tree: bool) -> Path:
        """Fetch, with all the space that the cache can give if that is needed."""
        try:
            return self._source.fetch(path, scratch, tree)
        except OSError as error:
            if error.errno not in FULL:
                raise
        self._cache.clear()
        for item in scratch.iterdir():
            _remove(item)
        try:
            return self._source.fetch(path, scratch, tree)
        except OSError as error:
            if error.errno not in FULL:
                raise
            message = f"{scratch.parent}: no space left to fetch {self.origin} {path}; free some and repeat the command"
            raise DiskFullError(message) from None


def _place(source: str | Path, target: Path) -> None:
    """Make ``target`` the file ``source``, by a hard link where that is possible."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _machine() -> str:
    """Names the space of process numbers that this process lives in: a machine, or a container on it."""
    spaces = "/proc/self/ns/pid"
    return f"{socket.gethostname()}.{os.stat(spaces).st_ino if os.path.exists(spaces) else 0}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
