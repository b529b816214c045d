"""Read annotation files into dialogues of one form, whichever of the accepted forms they have.

A file is a ``.json`` list, ``.jsonl`` lines or ``.parquet`` rows (the first two also compressed), and is read as a
stream. Which of them it is, and how it is compressed, is judged by its contents. A sample has ``conversations``
(``from``/``value`` or ``role``/``content``) and, unless it is text only, ``image`` (a path or a list of paths) or
``video`` (a path, with an optional clip from ``start`` to ``end`` seconds). The resulting :class:`Annotation`:

* roles are ``human``, ``gpt`` and ``system``
* every media item has one ``<image>`` placeholder, also a video; ``<video>`` is converted or refused
* a single media item without a placeholder gets one at the start of the first human turn, as such files mean it
* media paths are relative, and do not leave their root
* all other fields are in ``meta``

A sample that cannot be used is yielded as an :class:`AnnotationError` with its reason, never dropped silently.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from framestream.pipeline.annotations.json_samples import read_json_samples
from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, normalize, sample_id
from framestream.pipeline.annotations.parquet_samples import count_parquet_samples, read_parquet_samples
from framestream.pipeline.annotations.text_files import AnnotationFileError, foreign_kind
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.subset import select_subset
from framestream.pipeline.utils.parquet_footer import MAGIC

COMPRESSED = (".gz", ".zst")
MAX_FOREIGN = 100_000  #: samples in a row without conversations; a file with more is no annotation file

_NOT_READABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
#: What readers raise on damaged files.
_DAMAGE = (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError, MemoryError, RecursionError, TypeError)


def read_annotations(
    path: str | Path,
    entry: EntryConfig,
    *,
    placeholder: str = "convert",
    seed: int = 0,
    limit: int | None = None,
    compat: str = "none",
) -> Iterator[Annotation | AnnotationError]:
    """Yield the samples of ``entry`` that its sampling strategy selects, in the order of the file ``path``.

    Args:
        path: the entry's annotation file on this machine.
        entry: states the root, the reader, the kinds of media and the sampling.
        placeholder: ``convert`` turns ``<video>`` into ``<image>``, ``refuse`` makes it an error of the sample.
        seed: of ``random:N``.
        limit: maximum number of samples.
        compat: ``published`` makes a first turn that is not ``from`` human or gpt an error of the sample.

    Raises:
        AnnotationFileError: the file cannot be read, has an unknown suffix, is broken, or contains something else.
    """
    path = Path(path)
    samples: Iterator[tuple[int, Any]] = enumerate(_read_samples(path))
    if entry.sampling != "all":
        samples = _pick(samples, select_subset(entry.sampling, count_samples(path), seed))
    for position, sample in islice(samples, limit):
        try:
            if isinstance(sample, AnnotationError):
                raise sample
            yield normalize(sample, entry, position, placeholder, compat)
        except AnnotationError as error:
            error.entry, error.position = entry.name, position
            error.id = sample_id(sample, position)
            yield error


def count_samples(path: str | Path) -> int:
    """Count the samples in an annotation file.

    Raises:
        AnnotationFileError: as for :func:`read_annotations`.
    """
    path = Path(path)
    with _ReadErrors(path):
        if _file_format(path) == "parquet":
            return count_parquet_samples(path)
        return sum(1 for _ in _refuse_foreign(read_json_samples(path), path))


# Files ----------------------------------------------------------------------------------------------------------------


def _file_format(path: Path) -> str:
    """Return parquet or json, by the name of a file or, where they are of another kind, by its first bytes."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if not name.endswith((".json", ".jsonl", ".parquet")):
        raise AnnotationFileError(f"{path}: unknown annotation format; use .json, .jsonl or .parquet")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(MAGIC):
        return "parquet"
    if name.endswith(".parquet"):
        what = foreign_kind(head) or ("is empty" if not head else "is not a parquet file, whatever its name says")
        raise AnnotationFileError(f"{path}: {what}; {'fetch it again' if not head else 'name the file by its format'}")
    return "json"


def _read_samples(path: Path) -> Iterator[Any]:
    """Yield every sample as a plain value, and an AnnotationError for one that cannot be read."""
    with _ReadErrors(path):
        samples = read_parquet_samples(path) if _file_format(path) == "parquet" else read_json_samples(path)
        yield from _refuse_foreign(samples, path)


def _refuse_foreign(samples: Iterable[Any], path: Path) -> Iterator[Any]:
    """Yield the samples. A file of a few kB can unpack to millions of other values, so their number is bounded."""
    foreign = 0
    for sample in samples:
        foreign = 0 if isinstance(sample, dict) and "conversations" in sample else foreign + 1
        if foreign > MAX_FOREIGN:
            what = f"more than {MAX_FOREIGN:,} samples in a row have no conversations"
            raise AnnotationFileError(f"{path}: {what}; give a file of annotations")
        yield sample


class _ReadErrors:
    """Convert the errors that readers raise for a broken file into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise AnnotationFileError(f"{self._path}: no such annotation file; correct its path or fetch it")
        if isinstance(error, OSError) and error.errno in _NOT_READABLE:
            raise AnnotationFileError(f"{self._path}: cannot be opened ({error.strerror}); correct its path or rights")
        if isinstance(error, _DAMAGE) and not isinstance(error, AnnotationFileError):
            raise AnnotationFileError(f"{self._path}: cannot be read to its end ({_one_line(error)}); fetch it again")


def _pick(samples: Iterator[tuple[int, Any]], positions: range | np.ndarray) -> Iterator[tuple[int, Any]]:
    wanted = iter(positions)
    target = next(wanted, None)
    for position, sample in samples:
        if target is None:
            return
        if position == target:
            yield position, sample
            target = next(wanted, None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
