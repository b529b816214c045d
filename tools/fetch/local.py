"""Folders of this machine: ``dir:PATH``."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from framestream.tools.fetch.base import FetchError, check_path


class FolderSource:
    """The files below a folder, used where they are (see ``framestream.tools.fetch.base.Source``).

    Links are followed as long as they stay below the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.origin = f"dir:{folder}"
        self._root = os.path.realpath(folder)

    def find(self, path: str, tree: bool = False) -> int | None:
        """Bytes of a file or of the files directly in a folder."""
        try:
            named = self._locate(path, tree)
            if not tree:
                found = named.stat()
                return found.st_size if stat.S_ISREG(found.st_mode) else None
            with os.scandir(named) as items:
                sizes = [item.stat().st_size for item in items if item.is_file()]
            return sum(sizes) if sizes else None
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return None

    def identity(self, path: str, tree: bool = False) -> str:
        """Nothing: files that are here are cached nowhere."""
        return ""

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Where the file or folder is; ``scratch`` stays empty."""
        try:
            named = self._locate(path, tree)
            named.stat()
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise FetchError("missing_file", Path(self._root, path), f"cannot be opened ({text})") from None
        return named

    def _locate(self, path: str, tree: bool) -> Path:
        """``path`` below the root; FetchError if it, or with ``tree`` a file directly in it, leads out of it."""
        named = Path(self._root, check_path(self.origin, path))
        self._check(named)
        if tree and named.is_dir():
            with os.scandir(named) as items:
                for item in items:
                    if item.is_symlink():
                        self._check(Path(item.path))
        return named

    def _check(self, named: Path) -> None:
        real = os.path.realpath(named)
        if os.path.commonpath((real, self._root)) != self._root:
            raise FetchError("outside_root", named, f"a link leads out of its root to {real}")


class LocalFile:
    """A file of this machine that can be read at any place (see ``framestream.tools.fetch.base.Bytes``).

    Raises:
        FetchError: missing_file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self.name = Path(path), str(path)
        try:
            found = self._path.stat()
        except OSError as error:
            raise FetchError("missing_file", path, f"cannot be opened ({error.strerror})") from None
        if not stat.S_ISREG(found.st_mode):
            raise FetchError("missing_file", path, "is no file")
        self.size, self.identity = found.st_size, _identity(found)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end."""
        try:
            with open(self._path, "rb") as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise FetchError("bad_checksum", self.name, "the file has changed while it was being read")
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise FetchError("unreachable", self.name, f"cannot be read ({error.strerror})") from None


def _identity(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"
