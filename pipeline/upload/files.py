"""Local files that are uploaded, stored ones, and the digests by which they are compared."""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

READ_BYTES = 1 << 20


class UploadError(RuntimeError):
    """An upload failed; one line with the address, the reason and the fix, without addresses that hold credentials."""


class RefusedError(ValueError):
    """An upload is not done: the address is invalid, or what is there would be lost. One line with the fix."""


@dataclass(slots=True)
class UploadFile:
    """A file to upload.

    Args:
        name: path below the target.
        source: path of the file, or its bytes.
        sha256: hex digest that it must have, if it is known.
    """

    name: str
    source: Path | bytes
    sha256: str = ""
    size: int = field(init=False)
    _digests: dict[str, str] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.size = len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for reading."""
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as file:
            yield file

    def digest(self, kind: str) -> str:
        """Return the hex digest of a kind. It is computed once.

        Args:
            kind: ``sha256``, ``md5``, ``git`` (the id of a git blob) or ``xet``.

        Raises:
            OSError: the file cannot be read.
        """
        if kind == "sha256" and self.sha256:
            return self.sha256
        if kind not in self._digests:
            self._digests[kind] = self._xet_hash() if kind == "xet" else self._hash(kind)
        return self._digests[kind]

    def _hash(self, kind: str) -> str:
        digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
        if kind == "git":
            digest.update(b"blob %d\0" % self.size)
        with self.open() as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
        return digest.hexdigest()

    def _xet_hash(self) -> str:
        import hf_xet  # only buckets of the hub need it

        if isinstance(self.source, Path):
            return hf_xet.hash_files([str(self.source)])[0].hash
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.source)
            file.flush()
            return hf_xet.hash_files([file.name])[0].hash


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a target. ``digests`` has its hex digests by kind, as far as the store states them."""

    name: str
    size: int
    digests: Mapping[str, str]

    def is_copy_of(self, file: UploadFile) -> bool:
        """Return whether size and all stated digests are those of ``file``. Without any digest it is not."""
        if self.size != file.size or not self.digests:
            return False
        return all(file.digest(kind) == digest for kind, digest in self.digests.items())


def split_files(files: Sequence[UploadFile], most_bytes: int, most_files: int) -> Iterator[list[UploadFile]]:
    """Split files into lists of at most so many bytes and files, but at least one file."""
    batch: list[UploadFile] = []
    size = 0
    for file in files:
        if batch and (size + file.size > most_bytes or len(batch) == most_files):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch
