"""Write shards: plain USTAR files that are byte-identical for the same samples."""

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

BLOCK, RECORD = 512, 10_240  #: bytes; USTAR pads members to multiples of BLOCK and files to multiples of RECORD
MAX_MEMBER = 8**11 - 1  #: bytes of the largest member; a USTAR header states the size in 11 octal digits

#: A letter first, and no dot: webdataset and others take the text before the first dot of a name as the key.
KEY_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
EXTENSION_PATTERN = re.compile(r"[a-z][a-z0-9]*")

#: Extensions that webdataset or datasets decode, unpack or unpickle without being asked.
RESERVED_EXTENSIONS = frozenset(
    ("raw", "im", "ps", "bw", "mpg", "h5", "cls", "id", "index", "inx", "pkl", "pyd", "pth", "gz", "zst", "xz", "bz2")
)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A finished shard, as the index and other readers need it."""

    name: str  #: file name, such as train-000000.tar
    samples: int  #: number of samples
    bytes: int  #: size of the file
    sha256: str  #: hex digest of the file
    md5: str  #: hex digest of the file
    sample_offsets: tuple[int, ...]  #: offset of each sample's first header, then the end of the last member; in bytes

    @property
    def split(self) -> str:
        """``train`` or ``val``: the part of the name before the number."""
        return self.name.rpartition("-")[0]


class ShardWriter:
    """Write one shard, as a context manager. The file gets its name when the block ends without an error.

    A writer without samples leaves no file, because readers refuse empty shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes = 0  #: number of bytes written so far
        self.sample_offsets: list[int] = []
        self.sha256 = ""  #: hex digest of the finished file
        self.md5 = ""  #: hex digest of the finished file
        self._keys: set[str] = set()
        self._extensions: tuple[str, ...] = ()
        self._end = 0
        self._hashes = (hashlib.sha256(), hashlib.md5(usedforsecurity=False))
        self._stack = contextlib.ExitStack()

    @property
    def samples(self) -> int:
        """Number of samples added so far."""
        return len(self.sample_offsets)

    @property
    def info(self) -> ShardInfo:
        """The finished shard; valid after the block."""
        offsets = (*self.sample_offsets, self._end)
        return ShardInfo(self.path.name, self.samples, self.bytes, self.sha256, self.md5, offsets)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.samples:
            self._end = self.bytes
            # two blocks of zeros end the archive, then zeros fill the last record
            self._write(bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD))
            self.sha256, self.md5 = (digest.hexdigest() for digest in self._hashes)
        self._stack.__exit__(kind, error, trace)

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Append one sample.

        Args:
            key: of the sample, unique in the shard.
            members: bytes by extension; every sample of a shard has the same extensions in the same order.

        Returns:
            (offset, size) in bytes of each member's data in the file, by extension.

        Raises:
            ValueError: an invalid or repeated key, extensions unlike those of earlier samples, or a member over 8 GiB.
        """
        extensions = tuple(members)
        if not KEY_PATTERN.fullmatch(key):
            raise ValueError(
                f"{self.path}: key {key!r}: must start with a letter and have only letters, digits, _ and -"
            )
        if key in self._keys:
            raise ValueError(f"{self.path}: key {key!r}: is already in the shard")
        if self._extensions and extensions != self._extensions:
            raise ValueError(f"{self.path}: {key}: has {extensions}, but earlier samples have {self._extensions}")
        for extension, data in members.items():
            invalid = not EXTENSION_PATTERN.fullmatch(extension) or extension in RESERVED_EXTENSIONS
            if invalid or len(f"{key}.{extension}") > 100:  # USTAR's field for the name has 100 bytes
                raise ValueError(
                    f"{self.path}: {key}.{extension}: invalid name; some readers would change or decode it"
                )
            if len(data) > MAX_MEMBER:
                raise ValueError(
                    f"{self.path}: {key}.{extension}: has {len(data)} bytes, more than a USTAR member can have"
                )
        if not members:
            raise ValueError(f"{self.path}: {key}: a sample needs at least one member")
        if not self.samples:
            self._file = self._stack.enter_context(atomic_file(self.path))
        self._extensions = extensions
        self._keys.add(key)
        self.sample_offsets.append(self.bytes)
        ranges = {}
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")  # mode 0644; time, user and group are 0, without names
            header.size = len(data)
            self._write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
            ranges[extension] = (self.bytes, len(data))
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        return ranges

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)
        for digest in self._hashes:
            digest.update(data)
