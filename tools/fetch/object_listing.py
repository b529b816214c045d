"""Sources that list folders and serve files by HTTP: hub repositories and buckets.

A folder is listed when its first file is requested, and recent listings stay in memory. A hundred thousand files then
cost about a hundred requests. Files of a folder that is too large for the memory are requested one by one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from framestream.tools.common.near_names import near_names
from framestream.tools.fetch.base import FetchError, check_path, local_name
from framestream.tools.fetch.http.client import ExpectedFile, HttpClient
from framestream.tools.fetch.http.ranged_file import HttpFile

MAX_CACHED_FILES = 200_000  #: files of listings in memory, about 60 MB
MAX_NAME = 255  #: bytes of a file name on common file systems


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One file of a listing."""

    size: int  #: bytes
    identity: str  #: see :meth:`framestream.tools.fetch.base.MediaSource.identity`
    digests: Mapping[str, str] = field(default_factory=dict)  #: see framestream.tools.fetch.http.client.ExpectedFile


Listing = dict[str, ListedFile]  #: the files directly in one folder, by name


class ObjectStore(Protocol):
    """A store with folders, such as a bucket. Paths are relative to its root."""

    @property
    def http(self) -> HttpClient:
        """Client that downloads the files."""

    def files(self, folder: str) -> Iterable[tuple[str, ListedFile]]:
        """Yield each file directly in ``folder`` with its name; nothing if the folder is missing. ``""`` is the root.

        Raises:
            FetchError: unreachable, denied, timeout.
        """

    def url(self, path: str) -> str:
        """Return the URL of a file, signed if the store needs it.

        Raises:
            FetchError: unreachable, denied.
        """


class ListedSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` for the files below ``folder`` of a store."""

    def __init__(self, origin: str, store: ObjectStore, folder: str) -> None:
        self.origin, self._store, self._folder = origin, store, folder.strip("/")
        self._listings: OrderedDict[str, Listing | None] = OrderedDict()  # None: too large to cache
        self._cached_files = 0
        self._lock = threading.Lock()  # guards the two attributes above and _folder_locks
        self._folder_locks: dict[str, threading.Lock] = {}  # one thread lists a folder while others wait for it

    def find(self, path: str, tree: bool = False) -> int | None:
        """Return the bytes of a file or a folder of frames."""
        check_path(self.origin, path)
        if tree:
            files = self._list_tree(path)
            return sum(file.size for file in files.values()) if files else None
        file = self._find_file(path)
        return None if file is None else file.size

    def identity(self, path: str, tree: bool = False) -> str:
        """Return the checksum or ETag of a file, or one checksum of those of all files of a folder."""
        check_path(self.origin, path)
        if not tree:
            file = self._find_file(path)
            return file.identity if file else ""
        digest = hashlib.sha256()
        for name, file in sorted(self._list_tree(path).items()):
            digest.update(f"{name}\0{file.identity}\0".encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Download a file, or all files of a folder of frames, into ``scratch``."""
        check_path(self.origin, path)
        if tree:
            return self._fetch_tree(path, scratch)
        file = self._find_file(path)
        if file is None:
            raise FetchError("missing_file", f"{self.origin} {path}", f"there is no such file{self._near(path)}")
        self._download(path, file, scratch / local_name(path), 0, time.monotonic())
        return scratch / local_name(path)

    def open_matching(self, pattern: str) -> list[HttpFile]:
        """Open the files whose name matches the last part of ``pattern``, in no order.

        The folder is named without wildcards.
        """
        folder, _, name_pattern = self._full_path(pattern).rpartition("/")
        return [
            self._open(f"{folder}/{name}".lstrip("/"), file)
            for name, file in self._store.files(folder)
            if name == name_pattern or fnmatch.fnmatchcase(name, name_pattern)
        ]

    def _open(self, full_path: str, file: ListedFile) -> HttpFile:
        store, name = self._store, f"{self.origin} {full_path}"
        return HttpFile(store.http, lambda: store.url(full_path), name, file.size, file.identity)

    def _fetch_tree(self, path: str, scratch: Path) -> Path:
        target, done, started = scratch / "frames", 0, time.monotonic()
        files = self._list_tree(path)
        if not files:
            raise FetchError("missing_file", f"{self.origin} {path}", "there is no folder with files")
        target.mkdir()
        for name, file in files.items():
            check_path(f"{self.origin} {path}", name)
            if set(name) & set("/\0") or not _is_encodable(name) or len(name.encode()) > MAX_NAME:
                raise FetchError("outside_root", f"{self.origin} {path}", f"{name!r} is not a valid file name")
            self._download(f"{path}/{name}", file, target / name, done, started)
            done += file.size
        return target

    def _download(self, path: str, file: ListedFile, target: Path, done: int, started: float) -> None:
        http, location = self._store.http, f"{self.origin} {path}"
        limits = http.limits.subtract_used(started, done)
        expected = ExpectedFile(file.size, file.digests)
        http.download(self._store.url(self._full_path(path)), target, location, expected, limits)

    def _list_tree(self, path: str) -> Listing:
        files = self._list(self._full_path(path)) if _is_encodable(path) else {}
        if files is None:
            raise FetchError("too_large", f"{self.origin} {path}", f"the folder has more than {MAX_CACHED_FILES} files")
        return files

    def _find_file(self, path: str) -> ListedFile | None:
        if not _is_encodable(path):
            return None
        full_path = self._full_path(path)
        folder, _, name = full_path.rpartition("/")
        files = self._list(folder)
        if files is not None:
            return files.get(name)
        info = self._store.http.probe(self._store.url(full_path), f"{self.origin} {path}")
        return None if info is None else ListedFile(info.size, info.identity)

    def _near(self, path: str) -> str:
        """Return names that are near a missing one in its folder, for messages."""
        folder, _, name = self._full_path(path).rpartition("/")
        files = self._list(folder) if _is_encodable(path) else None
        return near_names(name, files) if files else ""

    def _list(self, folder: str) -> Listing | None:
        """Return the files of a folder by name, or None if they are too many to cache."""
        with self._lock:
            if folder in self._listings:
                return self._cached(folder)
            folder_lock = self._folder_locks.setdefault(folder, threading.Lock())
        # The request is made under the folder's own lock: threads that need other folders do not wait for it.
        with folder_lock:
            with self._lock:
                if folder in self._listings:  # another thread has listed it in the meantime
                    return self._cached(folder)
            return self._request(folder)

    def _cached(self, folder: str) -> Listing | None:
        """Return a cached listing and mark it as used. The caller holds the lock."""
        self._listings.move_to_end(folder)
        return self._listings[folder]

    def _request(self, folder: str) -> Listing | None:
        """List a folder and cache the result."""
        files: Listing = {}
        listing: Listing | None = files
        for name, file in self._store.files(folder):
            files[name] = file
            if len(files) > MAX_CACHED_FILES:
                listing = None
                break
        with self._lock:
            self._folder_locks.pop(folder, None)
            self._listings[folder] = listing
            self._cached_files += _weight(listing)
            while self._cached_files > MAX_CACHED_FILES and len(self._listings) > 1:
                _, oldest = self._listings.popitem(last=False)
                self._cached_files -= _weight(oldest)
        return listing

    def _full_path(self, path: str) -> str:
        """Return ``path`` relative to the root of the store."""
        return f"{self._folder}/{path}".lstrip("/")


def _is_encodable(path: str) -> bool:
    """Return whether a path can be sent as UTF-8. JSON may contain lone surrogates, which cannot."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _weight(listing: Listing | None) -> int:
    """Return what a listing counts against MAX_CACHED_FILES; an empty one counts 1."""
    return 1 + len(listing or ())


def name_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names as numbers: part_2 before part_10."""
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", name)]
