"""Protocols of file sources, and the error they raise.

A *source* gives access to the files below one root: a folder, a hub repository, archives, a web server or a bucket.
``find`` returns the size of a file without transferring it. ``fetch`` brings the file to this machine.
:class:`RandomAccessFile` is one local or remote file that can be read at any offset; archives are read through it.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Protocol

from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.storage import headers

UNKNOWN = headers.UNKNOWN  #: size of a file whose source does not state one


class FetchError(Exception):
    """A file cannot be fetched. The text is one line that names the file.

    Args:
        reason: one of the reasons of the ledger.
        location: the file or source, named at the start of the message.
        message: what is wrong, and the fix.
    """

    def __init__(self, reason: str, location: object, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not a reason of pipeline/shards/ledger.py; add it there")
        name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(location))
        self.reason, self.message = reason, " ".join(message.split())
        super().__init__(f"{name}: {self.message}")


class MediaSource(Protocol):
    """The files below one root. A ``path`` is relative, with forward slashes, without ``.`` and ``..``.

    Threads may share a source.
    """

    origin: str  #: what the source reads, in the syntax of the root map, with its revision and without credentials

    def find(self, path: str, tree: bool = False) -> int | None:
        """Return the bytes of the file ``path``, ``UNKNOWN`` if the source does not state them, None if it is missing.

        With ``tree`` the path is a folder of frames: the bytes of all files directly in it.

        Raises:
            FetchError: the source cannot be read (unreachable, denied).
        """

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Return a local path of the file. With ``tree``, return a folder with the files directly in folder ``path``.

        A file that is already on this machine is not copied: its own path is returned. Other files are written into
        ``scratch``, an empty folder that the caller removes afterwards. Nothing is written outside it.

        Raises:
            FetchError: missing_file, outside_root, too_large, unreachable, denied, timeout, bad_checksum ...
        """

    def identity(self, path: str, tree: bool = False) -> str:
        """Return a text that changes when the contents of ``path`` change, as far as the source states without a fetch.

        Together with ``origin`` and ``path`` it names the contents in caches. It is empty where ``origin`` is enough.
        """


class RandomAccessFile(Protocol):
    """One file that can be read at any offset. Threads may share it."""

    @property
    def name(self) -> str:
        """Name for messages; its extension tells the type of the file."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def identity(self) -> str:
        """Text that changes when the contents do: an ETag, a checksum, or size and time. Caches use it in names."""

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``, fewer only at the end of the file.

        Raises:
            FetchError: as for sources; bad_checksum if the file has changed since it was opened.
        """


def check_path(origin: str, path: str) -> str:
    """Return ``path`` if it is relative and stays below its root.

    Raises:
        FetchError: outside_root.
    """
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise FetchError("outside_root", f"{origin} {path!r}", "a path must be relative, without empty parts, . and ..")
    return path


def local_name(path: str) -> str:
    """Return a safe local name for the remote file ``path``, with the same extension."""
    suffix = PurePosixPath(path).suffix
    return f"media{suffix}" if re.fullmatch(r"\.\w{1,16}", suffix, re.ASCII) else "media"
