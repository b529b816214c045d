"""What every source of files can do, and how it fails.

A *source* holds the files below one root: a folder, a hub repository, archives, a web server, a bucket. ``find`` says
whether a file is there without moving it, ``fetch`` brings it to this machine. :class:`Bytes` is one remote or local
file that can be read at any place, which is what archives are read from.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Protocol

from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.storage import headers

UNKNOWN = headers.UNKNOWN  #: size of a file whose place does not tell it


class FetchError(Exception):
    """A file cannot be had: ``reason`` is one of the ledger's, the text is one clear line that names the file."""

    def __init__(self, reason: str, place: object, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not a reason of pipeline/shards/ledger.py; add it there")
        shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(place))
        super().__init__(f"{shown}: {' '.join(message.split())}")
        self.reason = reason


class MediaSource(Protocol):
    """The files below one root; ``path`` is relative, with forward slashes, without ``.`` and ``..``."""

    origin: str  #: what it reads from, as the root map words it, with its revision and without credentials

    def find(self, path: str, tree: bool = False) -> int | None:
        """Bytes of the file ``path`` (``UNKNOWN`` where its place does not tell), or None where there is none.

        With ``tree`` the path is a folder of frames: the bytes of all files directly in it.

        Raises:
            FetchError: the place cannot be asked (unreachable, denied).
        """

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """A local path of the file, or, with ``tree``, of a folder with the files directly in folder ``path``.

        Files already on this machine are named where they are; others are put into ``scratch``, an empty folder that
        the caller removes afterwards, and nothing is written outside it.

        Raises:
            FetchError: missing_file, outside_root, too_large, unreachable, denied, timeout, bad_checksum ...
        """

    def identity(self, path: str, tree: bool = False) -> str:
        """Text that is another one when the contents of ``path`` are, as far as its place tells without moving them.

        It names the contents in caches, with ``origin`` and ``path``; empty where ``origin`` says it all.
        """


class RandomAccessFile(Protocol):
    """One file that can be read at any place."""

    name: str  #: for messages, and its extension tells its kind
    size: int  #: bytes
    identity: str  #: changes when the content does (etag, checksum, or size and time); names caches of its contents

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end (FetchError as for sources)."""


def check_path(origin: str, path: str) -> str:
    """``path``, if it is relative and stays below its root.

    Raises:
        FetchError: outside_root.
    """
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise FetchError("outside_root", f"{origin} {path!r}", "a path must be relative, without empty parts, . and ..")
    return path


def local_name(path: str) -> str:
    """A safe name on this machine for the file ``path`` of somewhere else; keeps the extension."""
    suffix = PurePosixPath(path).suffix
    return f"media{suffix}" if re.fullmatch(r"\.\w{1,16}", suffix, re.ASCII) else "media"
