"""Files in memory that count the bytes read, and archives created in memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from framestream.tools.fetch.archives.archive import ArchiveSource, open_archives
from framestream.tools.fetch.base import FetchError


def content(source: ArchiveSource, path: str, scratch: Path) -> bytes:
    """Return the bytes of a fetched file, and check that it is the only one in the scratch folder."""
    scratch = scratch / "scratch"
    scratch.mkdir()
    try:
        found = source.fetch(path, scratch)
        assert list(scratch.iterdir()) == [found]
        return found.read_bytes()
    finally:
        shutil.rmtree(scratch)


def folder(source: ArchiveSource, path: str, scratch: Path) -> dict[str, bytes]:
    scratch = scratch / "scratch"
    scratch.mkdir()
    try:
        return {item.name: item.read_bytes() for item in source.fetch(path, scratch, tree=True).iterdir()}
    finally:
        shutil.rmtree(scratch)


def failure(source: ArchiveSource, path: str, scratch: Path, tree: bool = False) -> str:
    """Return the reason why a file cannot be fetched, and check that the message is one line."""
    with pytest.raises(FetchError) as error:
        folder(source, path, scratch) if tree else content(source, path, scratch)
    assert "\n" not in str(error.value) and path in str(error.value)
    return error.value.reason


def refused(*data: bytes, join: bool = False) -> tuple[str, str]:
    """Return the reason and message of the error when archives cannot be opened."""
    with pytest.raises(FetchError) as error:
        opened(*data, join=join)
    assert "\n" not in str(error.value) and "part" in str(error.value)
    return error.value.reason, str(error.value)


def entry(data: bytes, name: str) -> int:
    """Return the offset of a member's entry in the central directory."""
    place = data.index(b"PK\1\2")
    while data[place + 46 : place + 46 + len(name)] != name.encode():
        place = data.index(b"PK\1\2", place + 4)
    return place


def patched(data: bytes, name: str, form: str, offset: int, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, entry(data, name) + offset, value)
    return bytes(changed)


LIMIT = 1 << 30

#: Names of the kinds that :func:`pack` makes.
KINDS = ("stored", "deflate", "bzip2", "lzma", "ustar", "gnu", "pax", "tar.gz")


class Memory:
    """A :class:`framestream.tools.fetch.base.RandomAccessFile` in memory."""

    def __init__(self, data: bytes, name: str = "archive") -> None:
        self.name, self.size, self.data = name, len(data), data
        self.identity = hashlib.sha256(data).hexdigest()
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0 and size >= 0
        piece = self.data[offset : offset + size]
        self.reads.append((offset, len(piece)))
        return piece

    @property
    def moved(self) -> int:
        """Return the number of bytes read so far."""
        return sum(size for _, size in self.reads)


def pack(files: Mapping[str, bytes], kind: str) -> bytes:
    """Return the bytes of an archive created by the standard library."""
    if kind in ("stored", "deflate", "bzip2", "lzma"):
        return pack_zip(files.items(), ("stored", "deflate", "bzip2", "lzma").index(kind))
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT}
    data = pack_tar([(tarfile.TarInfo(name), data) for name, data in files.items()], formats.get(kind))
    return gzip.compress(data, 1) if kind == "tar.gz" else data


def pack_zip(files: Sequence[tuple[str | zipfile.ZipInfo, bytes]], method: int = 0) -> bytes:
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files:
            archive.writestr(name, data, methods[method])
    return out.getvalue()


def pack_tar(members: Sequence[tuple[tarfile.TarInfo, bytes]], form: int | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form or tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_link(name: str, target: str) -> tuple[zipfile.ZipInfo, bytes]:
    """Return a symbolic link as Info-ZIP stores it."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info, target.encode()


def opened(
    *data: bytes, join: bool = False, inside: str = "", work: Path | None = None, limit: int = LIMIT
) -> ArchiveSource:
    """Open archives, or the parts of one, as a source."""
    files = [Memory(piece, f"part{number}") for number, piece in enumerate(data)]
    return open_archives(files, join, inside, work, limit, "here")
