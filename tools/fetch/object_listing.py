"""Sources that list their folders and serve their files by HTTP: hub repositories and buckets.

A folder is listed when the first of its files is asked for, and what was listed last is kept, so that a hundred
thousand files cost a hundred requests. A folder with more files than are kept is asked for one by one.
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

from framestream.tools.fetch.base import FetchError, check_path, local_name
from framestream.tools.fetch.http.client import Expected, HttpClient
from framestream.tools.fetch.http.ranged_file import HttpFile

KEPT = 200_000  #: files of listings in memory, about 60 MB


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One file of a listing."""

    size: int
    identity: str
    digests: Mapping[str, str] = field(default_factory=dict)  #: see framestream.tools.fetch.http.client.Expected


class ObjectStore(Protocol):
    """A place with folders; paths count from its root."""

    http: HttpClient

    def files(self, folder: str) -> Iterable[tuple[str, ListedFile]]:
        """Name and item of each file directly in ``folder``, ``""`` for the root; nothing if it is not there."""

    def url(self, path: str) -> str:
        """Address of a file."""


class ListedSource:
    """The files below ``folder`` of a store (see ``framestream.tools.fetch.base.Source``). Threads may share one."""

    def __init__(self, origin: str, store: ObjectStore, folder: str) -> None:
        self.origin, self._store, self._folder = origin, store, folder.strip("/")
        self._listings: OrderedDict[str, dict[str, ListedFile] | None] = OrderedDict()
        self._kept = 0
        self._lock = threading.Lock()
        self._waiting: dict[str, threading.Lock] = {}  # one thread lists a folder, the others wait for it

    def find(self, path: str, tree: bool = False) -> int | None:
        """Bytes of a file or a folder of frames."""
        check_path(self.origin, path)
        if tree:
            items = self._tree(path)
            return sum(item.size for item in items.values()) if items else None
        item = self._item(path)
        return None if item is None else item.size

    def identity(self, path: str, tree: bool = False) -> str:
        """Checksum or ETag, of all files of a folder together."""
        check_path(self.origin, path)
        if not tree:
            item = self._item(path)
            return item.identity if item else ""
        digest = hashlib.sha256()
        for name, item in sorted(self._tree(path).items()):
            digest.update(f"{name}\0{item.identity}\0".encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Download a file, or all files of a folder of frames, into ``scratch``."""
        check_path(self.origin, path)
        if tree:
            return self._fetch_tree(path, scratch)
        item = self._item(path)
        if item is None:
            raise FetchError("missing_file", f"{self.origin} {path}", "nothing at the path")
        self._download(path, item, scratch / local_name(path), 0, time.monotonic())
        return scratch / local_name(path)

    def matching(self, pattern: str) -> list[HttpFile]:
        """Files whose name matches the last part of ``pattern``, in no order; the folder is named without wildcards."""
        folder, _, wanted = self._full(pattern).rpartition("/")
        return [
            self._bytes(f"{folder}/{name}".lstrip("/"), item)
            for name, item in self._store.files(folder)
            if name == wanted or fnmatch.fnmatchcase(name, wanted)
        ]

    def _bytes(self, full: str, item: ListedFile) -> HttpFile:
        store, name = self._store, f"{self.origin} {full}"
        return HttpFile(store.http, lambda: store.url(full), name, item.size, item.identity)

    def _fetch_tree(self, path: str, scratch: Path) -> Path:
        target, done, started = scratch / "frames", 0, time.monotonic()
        items = self._tree(path)
        if not items:
            raise FetchError("missing_file", f"{self.origin} {path}", "no folder with files at the path")
        target.mkdir()
        for name, item in items.items():
            check_path(f"{self.origin} {path}", name)
            if set(name) & set("/\0") or not _is_text(name) or len(name.encode()) > 255:
                raise FetchError("outside_root", f"{self.origin} {path}", f"{name!r} is no name of a file")
            self._download(f"{path}/{name}", item, target / name, done, started)
            done += item.size
        return target

    def _download(self, path: str, item: ListedFile, target: Path, done: int, started: float) -> None:
        http, place = self._store.http, f"{self.origin} {path}"
        limits = http.limits.after(started, done)
        http.download(self._store.url(self._full(path)), target, place, Expected(item.size, item.digests), limits)

    def _tree(self, path: str) -> dict[str, ListedFile]:
        items = self._list(self._full(path)) if _is_text(path) else {}
        if items is None:
            raise FetchError("too_large", f"{self.origin} {path}", f"the folder has more than {KEPT} files")
        return items

    def _item(self, path: str) -> ListedFile | None:
        if not _is_text(path):
            return None
        full = self._full(path)
        folder, _, name = full.rpartition("/")
        items = self._list(folder)
        if items is not None:
            return items.get(name)
        facts = self._store.http.probe(self._store.url(full), f"{self.origin} {path}")
        return None if facts is None else ListedFile(facts.size, facts.identity)

    def _list(self, folder: str) -> dict[str, ListedFile] | None:
        """The files of a folder by name; None if they are too many to keep."""
        with self._lock:
            if folder in self._listings:
                return self._use(folder)
            waiting = self._waiting.setdefault(folder, threading.Lock())
        with waiting:
            with self._lock:
                if folder in self._listings:
                    return self._use(folder)
            return self._ask(folder)

    def _use(self, folder: str) -> dict[str, ListedFile] | None:
        self._listings.move_to_end(folder)
        return self._listings[folder]

    def _ask(self, folder: str) -> dict[str, ListedFile] | None:
        items: dict[str, ListedFile] | None = {}
        for name, item in self._store.files(folder):
            items[name] = item
            if len(items) > KEPT:
                items = None
                break
        with self._lock:
            self._waiting.pop(folder, None)
            self._listings[folder] = items
            self._kept += _weight(items)
            while self._kept > KEPT and len(self._listings) > 1:
                _, old = self._listings.popitem(last=False)
                self._kept -= _weight(old)
        return items

    def _full(self, path: str) -> str:
        return f"{self._folder}/{path}".lstrip("/")


def _is_text(path: str) -> bool:
    """Whether a path can be sent: not one with parts of characters, as JSON may hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _weight(items: dict[str, ListedFile] | None) -> int:
    return 1 + len(items or ())


def name_order(name: str) -> list[tuple[int, str]]:
    """Sorts names with their numbers as numbers: part_2 before part_10."""
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", name)]
