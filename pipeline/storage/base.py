"""The interface of every storage, and the options for reading remote ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from framestream.pipeline.config import manifest
from framestream.pipeline.utils.paths import expand_path


class ReadOptionsError(ValueError):
    """Options for reading do not fit the machine or the root; one line that names the option and the fix."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How remote roots are read; the fields are those of ``loader`` in the manifest."""

    cache: str = manifest.LoaderConfig.cache  #: folder for local copies
    cache_gb: float = manifest.LoaderConfig.cache_gb  #: limit on the cached ranges; 0 caches none
    timeout: float = manifest.LoaderConfig.read_timeout  #: seconds of one read, including all tries and waits
    retries: int = manifest.LoaderConfig.retries  #: tries of one request after the first
    access: str = manifest.LoaderConfig.access  #: ``ranges``, or ``sequential`` for local copies of whole shards

    @classmethod
    def from_manifest(cls, loader: manifest.LoaderConfig) -> ReadOptions:
        """Return the options that a manifest states."""
        return cls(loader.cache, loader.cache_gb, loader.read_timeout, loader.retries, loader.access)

    def check_copies(self, place: object, shard_bytes: int) -> None:
        """Check that a shard of ``shard_bytes`` bytes can be copied, if shards are. ``place`` is for messages.

        Raises:
            ReadOptionsError: there is less room.
        """
        if self.access == "sequential" and shard_bytes > self.cache_bytes:
            size = f"{shard_bytes:,} bytes; loader.cache_gb: {self.cache_gb:g} has room for {self.cache_bytes:,}"
            raise ReadOptionsError(f"{place}: a shard has {size}; raise it, or set loader.access: ranges")

    @property
    def cache_bytes(self) -> int:
        """``cache_gb`` in bytes."""
        return int(self.cache_gb * 1e9)

    @property
    def cache_folder(self) -> Path:
        """``cache`` with ``~`` and variables expanded."""
        return Path(expand_path(self.cache))

    def root_folder(self, root: str) -> Path:
        """Return the folder in ``cache`` for one root: an address, or the absolute path of a folder."""
        name = re.sub(r"[^\w.-]+", "-", root.rpartition("://")[2])[-60:].strip("-.")
        digest = hashlib.sha256(root.encode(errors="surrogateescape")).hexdigest()[:16]
        return self.cache_folder / "roots" / f"{name}-{digest}"


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A file as the index describes it.

    A remote file of another size is refused. Its ranges are cached by digest, so that another build at the same address
    is never confused with it.
    """

    name: str  #: path below the root, with forward slashes
    size: int  #: bytes
    digest: str  #: sha256, hexadecimal; empty if unknown, and then nothing is cached


class Storage(Protocol):
    """The files of one root. Threads may share it, and so may processes forked after it has read."""

    @property
    def root(self) -> Path | str:
        """The root as messages name it, without a password."""

    @property
    def remote(self) -> bool:
        """Whether reading needs another machine."""

    @property
    def derived_folders(self) -> list[Path]:
        """Local folders for what is derived from the root, such as token caches.

        The first that can be written is used. The last one is in ``ReadOptions.cache``; it may not exist yet.
        """

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> Iterable[bytes | memoryview]:
        """Return the ranges (offset, size) of a file, in the order requested; a local file is read lazily.

        Raises:
            OSError, ValueError: one line that names the file; TimeoutError after ``ReadOptions.timeout``.
        """

    def prefetch(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> bool:
        """Request ranges that :meth:`read` will be asked for soon, if this storage can do that without waiting.

        Returns:
            Whether it did; False if nothing is gained, or enough is under way. Try again after the next read.
        """

    def read_in_order(self, shard: ShardRef, offset: int, size: int) -> Iterator[bytes]:
        """Yield consecutive bytes of a file in pieces; a remote file over one request.

        Raises:
            OSError, ValueError: one line that names the file; TimeoutError if a piece takes longer than
                ``ReadOptions.timeout``.
        """

    def read_all(self, name: str) -> bytes:
        """Return the current content of a small file.

        Raises:
            FileNotFoundError: there is no such file.
            OSError, ValueError: as for :meth:`read`.
        """

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        """Return local paths of complete files: the files themselves, or copies stored under ``version`` (a file name).

        Args:
            check: called once with new copies; it raises ValueError if they do not belong together.
        """

    def describe(self, name: str) -> Path | str:
        """Return a file's name for messages; a path if the root is a folder."""
