"""Folders of this machine as a source: ``dir:PATH``."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from framestream.tools.fetch.base import FetchError, check_path


class FolderSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` for a local folder. Files are used without a copy.

    Links are followed as long as their targets are below the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.origin = f"dir:{folder}"
        self._root = os.path.realpath(folder)

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
            raise FetchError("missing_file", Path(self._root, path), f"cannot be opened ({text})") from None
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
        if os.path.commonpath((real, self._root)) != self._root:
            raise FetchError("outside_root", local, f"a link leads out of its root to {real}")


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


def _identity(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"
