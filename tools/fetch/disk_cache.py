"""Disk cache of fetched files, limited in bytes, which any number of processes and machines may share.

There are no locks. A cached file, or the files of a folder of frames, appear as a folder by one rename and never
change. The name of the folder is derived from their origin and contents. They are used through hard links in the user's
scratch folder, so evicting them takes nothing away from a reader. Each entry also has an empty file whose name is the
digest of the others. It is compared whenever they are used, and a damaged entry is evicted. The entry that was used
longest ago is evicted first (modification time of the folder, which every use updates). Scratch folders of processes
that no longer run are removed when a cache is opened::

    FOLDER/files/ab/abcdef.../   one cached file, or the files of one folder
    FOLDER/scratch/HOST-PID-.../ scratch folders, and entries that are being added or evicted
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.pipeline.utils.digests import bytes_digest, file_digest
from framestream.tools.fetch.base import MediaSource

ABANDONED_AFTER = 24 * 3600  #: seconds after which a scratch folder of another machine counts as abandoned
MEASURE_SHARE = 256  #: the cache is measured again after one process has added 1/256 of its limit
LOW_SHARE = 7 / 8  #: share of the limit that an eviction leaves, so that other processes may add files meanwhile
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_HARD_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  #: files are copied instead


_MARK = re.compile(r"\.xxh3-[0-9a-f]{16}")

logger = logging.getLogger(__name__)


class DiskFullError(OSError):
    """No space is left on a disk. The message is one line with the fix."""


def is_disk_full(error: Exception) -> bool:
    """Return whether an error means that no space is left."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in DISK_FULL)


@contextlib.contextmanager
def disk_full_at(folder: Path) -> Iterator[None]:
    """Turn a lack of space within the block into a DiskFullError that names ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DiskFullError(f"{folder}: no space left on the disk; free some and repeat the command") from None


@dataclass(frozen=True, slots=True)
class _CacheEntry:
    path: Path  # of its folder
    size: int  # bytes
    used: float  # time of the last use


class DiskCache:
    """A cache below ``folder`` of at most ``max_bytes`` bytes; 0 caches nothing.

    Between two measurements, each process may exceed the limit by 1/256 of it or by one file. Scratch folders, with the
    files that each process has fetched and not yet used, are not counted.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._files, self._scratch = Path(folder) / "files", Path(folder) / "scratch"
        self.max_bytes = max_bytes
        self._has_warned = False
        self._added = max_bytes  # bytes since the last measurement; this value makes the first addition measure
        self._files.mkdir(parents=True, exist_ok=True)
        self._scratch.mkdir(exist_ok=True)
        self._prefix = f"{_process_namespace()}-{os.getpid()}-"
        self.remove_abandoned()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder, which is removed at the end, or later if the process is killed."""
        folder = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self._scratch))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def get(self, key: str, scratch: Path, tree: bool = False) -> Path | None:
        """Link the entry of ``key`` into ``scratch``.

        Return its file, or with ``tree`` a folder of its files; None if it is not cached.
        """
        target = scratch / "cached"
        target.mkdir()
        path = self._entry_path(key)
        names, marks = self._link_entry(path, target)
        if names and (tree or len(names) == 1) and marks == [_digest_mark(target, names)]:
            return target if tree else target / names[0]
        shutil.rmtree(target)
        if names or marks:
            self._evict(path)
            self._warn_damaged(path, had_digest=bool(marks))
        return None

    def _warn_damaged(self, path: Path, had_digest: bool) -> None:
        if had_digest:
            logger.warning("%s: damaged (its digest differs); it is fetched again", path)
        elif not self._has_warned:
            self._has_warned = True
            logger.warning("%s: files without digests, as in older versions, are fetched again", self._files)

    def put(self, key: str, path: Path) -> None:
        """Add ``path``, a file or a folder of files in a scratch folder, as the entry of ``key``.

        Nothing is added if it is too large or the disk is full.
        """
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        entry_path = self._entry_path(key)
        if not self.max_bytes or size > self.max_bytes or entry_path.exists():
            return
        if any(_MARK.fullmatch(file.name) for file in files):
            return
        self._added += size
        if self._added > self.max_bytes // MEASURE_SHARE:
            self._measure(size)
        try:
            self._insert(files, entry_path)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def trim(self) -> int:
        """Evict entries until the limit holds, whatever other processes have added. Return the bytes that are left."""
        return self._measure(0)

    def clear(self) -> None:
        """Evict all entries."""
        for entry in self._entries():
            self._evict(entry.path)

    def remove_abandoned(self) -> None:
        """Remove scratch folders of processes of this machine that no longer run, and any that are a day old."""
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix=self._prefix) as probe:
            now = os.stat(probe.name).st_mtime  # by the clock of the file system, which may be another machine's
        for item in list(os.scandir(self._scratch)):
            namespace, _, process = item.name.rpartition("-")[0].rpartition("-")
            with contextlib.suppress(FileNotFoundError):
                dead = namespace == _process_namespace() and process.isdigit() and not _is_alive(int(process))
                if dead or now - item.stat(follow_symlinks=False).st_mtime > ABANDONED_AFTER:
                    _remove(Path(item.path))

    def _entry_path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self._files / name[:2] / name

    def _link_entry(self, entry_path: Path, target: Path) -> tuple[list[str], list[str]]:
        """Link the files of an entry into ``target``.

        Return their names, and the names of its marks; none if the entry does not exist.
        """
        try:
            handle = os.open(entry_path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return [], []
        try:
            listed = sorted(os.listdir(handle))
            marks = [name for name in listed if _MARK.fullmatch(name)]
            names = [name for name in listed if name not in marks]
            for name in names:
                _link_or_copy(entry_path / name, target / name)
            os.utime(entry_path)
            # If the entry was evicted in between, the path leads to another folder or to none, and ``names`` may be
            # only a part of its files.
            return (names, marks) if os.stat(entry_path).st_ino == os.fstat(handle).st_ino else ([], [])
        except FileNotFoundError:
            return [], []
        finally:
            os.close(handle)

    def _insert(self, files: list[Path], entry_path: Path) -> None:
        entry_path.parent.mkdir(exist_ok=True)
        with self.scratch() as scratch:
            ready = scratch / "ready"
            ready.mkdir()
            for file in files:
                _link_or_copy(file, ready / file.name)
                fsync_path(ready / file.name)
            (ready / _digest_mark(ready, [file.name for file in files])).touch()
            try:
                os.rename(ready, entry_path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process has added the same entry
                    raise

    def _measure(self, coming: int) -> int:
        """Evict entries if ``coming`` more bytes would exceed the limit. Return the bytes of the entries left."""
        self._added = coming
        entries = self._entries()
        total = sum(entry.size for entry in entries)
        if total + coming > self.max_bytes:
            for entry in sorted(entries, key=lambda entry: entry.used):
                if total <= LOW_SHARE * self.max_bytes - coming:
                    break
                self._evict(entry.path)
                total -= entry.size
        return total

    def _entries(self) -> list[_CacheEntry]:
        entries = []
        for folder in list(os.scandir(self._files)):
            for item in list(os.scandir(folder)):
                with contextlib.suppress(FileNotFoundError):
                    size = sum(file.stat().st_size for file in list(os.scandir(item)))
                    entries.append(_CacheEntry(Path(item.path), size, item.stat().st_mtime))
        return entries

    def _evict(self, path: Path) -> None:
        """Remove ``path``. It disappears by one rename, so no reader finds a part of it."""
        with contextlib.suppress(FileNotFoundError), self.scratch() as scratch:
            os.rename(path, scratch / "evicted")


class CachedSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` whose files are cached on disk.

    If several threads request the same file at once, one of them fetches it. Its failure is also that of the others.
    """

    def __init__(self, source: MediaSource, cache: DiskCache) -> None:
        self.origin = source.origin
        self._source, self._cache = source, cache
        self._fetching: dict[str, Future[None]] = {}  # by key; done when the entry is cached
        self._lock = threading.Lock()  # guards _fetching; it is not held during a fetch

    def find(self, path: str, tree: bool = False) -> int | None:
        """Return what the source returns."""
        return self._source.find(path, tree)

    def identity(self, path: str, tree: bool = False) -> str:
        """Return what the source returns."""
        return self._source.identity(path, tree)

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Return the file from the cache, or else from the source.

        ``scratch`` should be a scratch folder of the cache: links need the same file system.

        Raises:
            FetchError: see :meth:`framestream.tools.fetch.base.MediaSource.fetch`.
            DiskFullError: no space is left, even with an empty cache.
        """
        if not self._cache.max_bytes:
            return self._fetch(path, scratch, tree)
        key = "\0".join((self.origin, self._source.identity(path, tree), path, "tree" if tree else "file"))
        with self._lock:
            fetching = self._fetching.get(key)
            if fetching is None:
                own_fetch = self._fetching[key] = Future()
        if fetching:
            fetching.result()
            return self._get_or_fetch(key, path, scratch, tree)
        try:
            local = self._get_or_fetch(key, path, scratch, tree)
        except BaseException as error:
            own_fetch.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._fetching[key]
        own_fetch.set_result(None)
        return local

    def _get_or_fetch(self, key: str, path: str, scratch: Path, tree: bool) -> Path:
        local = self._cache.get(key, scratch, tree)
        if local is None:
            local = self._fetch(path, scratch, tree)
            if local.is_relative_to(scratch):
                self._cache.put(key, local)
        return local

    def _fetch(self, path: str, scratch: Path, tree: bool) -> Path:
        """Fetch from the source. If the disk is full, empty the cache and try again."""
        try:
            return self._source.fetch(path, scratch, tree)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        self._cache.clear()
        for item in scratch.iterdir():
            _remove(item)
        try:
            return self._source.fetch(path, scratch, tree)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            message = f"{scratch.parent}: no space left to fetch {self.origin} {path}; free some and repeat the command"
            raise DiskFullError(message) from None


def _digest_mark(folder: Path, names: list[str]) -> str:
    """Return the name of the empty file that stands for the digest of files of a folder."""
    digests = [[name, file_digest(folder / name)] for name in sorted(names)]
    return f".xxh3-{bytes_digest(json.dumps(digests).encode())}"


def _link_or_copy(source: Path, target: Path) -> None:
    """Create ``target`` as a hard link of ``source``, or as a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _process_namespace() -> str:
    """Name the namespace that this process's id is valid in: a machine, or a container on it."""
    namespace = "/proc/self/ns/pid"
    return f"{socket.gethostname()}.{os.stat(namespace).st_ino if os.path.exists(namespace) else 0}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
