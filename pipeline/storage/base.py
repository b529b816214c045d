"""What every storage can do, and the settings of remote ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from framestream.pipeline.config import manifest


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How remote roots are read; the fields are those of ``loader`` in the manifest."""

    cache: str = manifest.LoaderConfig.cache  #: folder of copies
    cache_gb: float = manifest.LoaderConfig.cache_gb  #: bound on the ranges kept there; 0 keeps none
    timeout: float = manifest.LoaderConfig.read_timeout  #: seconds of one read, all tries and waits together
    retries: int = manifest.LoaderConfig.retries  #: tries of one request after the first

    @classmethod
    def from_manifest(cls, loader: manifest.LoaderConfig) -> ReadOptions:
        """The settings that a manifest states."""
        return cls(loader.cache, loader.cache_gb, loader.read_timeout, loader.retries)


@dataclass(frozen=True, slots=True)
class ShardRef:
    """What an index says about a file: it is refused where its place has another size, and ranges of it are cached
    under its digest, so that another build at the same address is never taken for it."""

    name: str  #: path below the root, with forward slashes
    size: int  #: bytes
    digest: str  #: sha256, hexadecimal; empty where it is not known, and then nothing is cached


class Storage(Protocol):
    """The files of one root; threads may share it, and processes forked from one that has read."""

    root: Path | str  #: as it is named in messages: no password stands in it
    remote: bool  #: whether reading asks another machine
    folder: Path  #: local folder for what is derived from the root, such as token caches; made when first asked for

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> Iterable[bytes | memoryview]:
        """The ranges (offset, size) of a file, in the order asked; of a folder each is read when its turn comes.

        Raises:
            OSError, ValueError: one line that names the file; TimeoutError after ``Reading.timeout``.
        """

    def read_all(self, name: str) -> bytes:
        """A small file, as it is now.

        Raises:
            FileNotFoundError: there is none.
            OSError, ValueError: as of :meth:`read`.
        """

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        """Local paths of whole files: they themselves, or copies of ``version`` (a file name) that were made once and
        had passed ``check``, which raises ValueError of copies that do not belong together."""

    def describe(self, name: str) -> Path | str:
        """A file as messages name it; a path where the root is a folder."""
