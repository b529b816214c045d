"""TODO."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from framestream.pipeline.utils.atomic_io import atomic_file

BLOCK, RECORD = 512, 10_240  #: sizes in bytes that USTAR rounds members and files up to

MAX_MEMBER = 8**11 - 1  #: largest member in bytes that a USTAR header can state

KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

EXTENSION = re.compile(r"[a-z][a-z0-9]*")

#: extensions that webdataset or datasets decode, unpack or unpickle by themselves
TAKEN = frozenset(
    ("raw", "im", "ps", "bw", "mpg", "h5", "cls", "id", "index", "inx", "pkl", "pyd", "pth", "gz", "zst", "xz", "bz2")
)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A finished shard, as the index and other readers need it."""

    name: str  #: file name, such as train-000000.tar
    samples: int
    bytes: int  #: of the file
    sha256: str
    md5: str
    sample_offsets: tuple[int, ...]  #: header of each sample's first member, then the place after the last member

    @property
    def split(self) -> str:
        """``train`` or ``val``, the part of the name before the number."""
        return self.name.rpartition("-")[0]


class ShardWriter:
    """Write one shard; a context manager. The file appears under its name when the block ends without an error.

    A writer to which nothing was added leaves no file, because readers refuse empty shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes = 0  #: written so far
        self.sample_offsets: list[int] = []
        self.sha256 = ""  #: of the finished file
        self.md5 = ""  #: of the finished file
        self._keys: set[str] = set()
        self._extensions: tuple[str, ...] = ()
        self._end = 0
        self._hashes = (hashlib.sha256(), hashlib.md5(usedforsecurity=False))
        self._stack = contextlib.ExitStack()

    @property
    def samples(self) -> int:
        """Samples added so far."""
        return len(self.sample_offsets)

    @property
    def info(self) -> ShardInfo:
        """The finished shard (after the block)."""
        offsets = (*self.sample_offsets, self._end)
        return ShardInfo(self.path.name, self.samples, self.bytes, self.sha256, self.md5, offsets)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.samples:
            self._end = self.bytes
            self._write(bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD))
            self.sha256, self.md5 = (digest.hexdigest() for digest in self._hashes)
        self._stack.__exit__(kind, error, trace)

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Append the sample ``key`` with its ``members`` by extension; returns (offset, size) of each member's bytes.

        Raises:
            ValueError: a bad or repeated key, extensions unlike those of the samples before, or a member over 8 GiB.
        """
        extensions = tuple(members)
        if not KEY.fullmatch(key):
            raise ValueError(f"{self.path}: key {key!r}: must start with a letter and hold letters, digits, _ and -")
        if key in self._keys:
            raise ValueError(f"{self.path}: key {key!r}: is in the shard already")
        if self._extensions and extensions != self._extensions:
            raise ValueError(f"{self.path}: {key}: has {extensions}, the samples before have {self._extensions}")
        for extension, data in members.items():
            if not EXTENSION.fullmatch(extension) or extension in TAKEN or len(f"{key}.{extension}") > 100:
                raise ValueError(f"{self.path}: {key}.{extension}: not a name that every reader takes as it is")
            if len(data) > MAX_MEMBER:
                raise ValueError(f"{self.path}: {key}.{extension}: {len(data)} bytes are more than USTAR can hold")
        if not members:
            raise ValueError(f"{self.path}: {key}: a sample needs at least one member")
        if not self.samples:
            self._file = self._stack.enter_context(atomic_file(self.path))
        self._extensions = extensions
        self._keys.add(key)
        self.sample_offsets.append(self.bytes)
        places = {}
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")  # mode 0644, time, user and group 0, no names
            header.size = len(data)
            self._write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
            places[extension] = (self.bytes, len(data))
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        return places

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)
        for digest in self._hashes:
            digest.update(data)
