"""Folders of this machine as a source: ``dir:PATH``, or ``links:PATH`` where links may lead out of the folder."""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from itertools import islice
from pathlib import Path

from framestream.tools.common.near_names import near_names
from framestream.tools.fetch.base import FetchError, check_path

_MAX_LISTED = 2000  # files of a folder that are compared with a missing name


class FolderSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` for a local folder. Files are used without a copy.

    Links are followed as long as their targets are below the folder, or, with ``follow_links``, wherever they lead.
    """

    def __init__(self, folder: str | Path, follow_links: bool = False) -> None:
        self.origin = f"{'links' if follow_links else 'dir'}:{folder}"
        self._root = os.path.realpath(folder)
        self._follow_links = follow_links

    def find(self, path: str, tree: bool = False) -> int | None:
        """Return the bytes of a file, or of the files directly in a folder."""
        try:
            local = self._locate(path, tree)
            if not tree:
                status = local.stat()
                return status.st_size if stat.S_ISREG(status.st_mode) else None
            with os.scandir(local) as items:
                sizes = [item.stat().st_size for item in items if item.is_file()]
            return sum(sizes) if sizes else None
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None

    def identity(self, path: str, tree: bool = False) -> str:
        """Return an empty text: local files are not cached."""
        return ""

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Return the path of the file or folder. Nothing is written to ``scratch``."""
        try:
            local = self._locate(path, tree)
            local.stat()
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
            near = _near(self._root, path) if isinstance(error, FileNotFoundError) else ""
            raise FetchError("missing_file", Path(self._root, path), f"cannot be opened ({text}){near}") from None
        return local

    def _locate(self, path: str, tree: bool) -> Path:
        """Return ``path`` below the root.

        Raises:
            FetchError: outside_root, if ``path`` leads out of the root, or with ``tree`` a file directly in it does.
        """
        local = Path(self._root, check_path(self.origin, path))
        self._check_inside(local)
        if tree and local.is_dir():
            with os.scandir(local) as items:
                for item in items:
                    if item.is_symlink():
                        self._check_inside(Path(item.path))
        return local

    def _check_inside(self, local: Path) -> None:
        real = os.path.realpath(local)
        if not self._follow_links and os.path.commonpath((real, self._root)) != self._root:
            fix = "if that is wanted, map the root to links:FOLDER in a root map (data.roots)"
            raise FetchError("outside_root", local, f"a link leads out of its root; {fix}")


class LocalFile:
    """A :class:`~framestream.tools.fetch.base.RandomAccessFile` on this machine.

    Raises:
        FetchError: missing_file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self.name = Path(path), str(path)
        try:
            status = self._path.stat()
        except OSError as error:
            raise FetchError("missing_file", path, f"cannot be opened ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):
            raise FetchError("missing_file", path, "is not a regular file")
        self.size, self.identity = status.st_size, _identity(status)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``, fewer only at the end of the file."""
        try:
            with open(self._path, "rb") as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise FetchError("bad_checksum", self.name, "the file has changed while it was being read")
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise FetchError("unreachable", self.name, f"cannot be read ({error.strerror})") from None


def _near(root: str, path: str) -> str:
    """Return names that are near the first part of ``path`` that is missing, for messages."""
    folder = root
    for part in path.split("/"):
        if not os.path.lexists(os.path.join(folder, part)):
            return near_names(part, _list_names(folder))
        folder = os.path.join(folder, part)
    return ""


@lru_cache(maxsize=64)
def _list_names(folder: str) -> tuple[str, ...]:
    """Return the names in a folder; none if they are too many for a message, or it cannot be read."""
    try:
        with os.scandir(folder) as items:
            names = tuple(item.name for item in islice(items, _MAX_LISTED + 1))
    except OSError:
        return ()
    return names if len(names) <= _MAX_LISTED else ()


def _identity(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"
