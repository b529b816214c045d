"""Read annotation files into dialogues of one form, whichever of the accepted forms they have.

A file is a ``.json`` list, ``.jsonl`` lines or ``.parquet`` rows (the first two also ``.gz`` or ``.zst``) and is read
as a stream. A sample has ``conversations`` (``from``/``value`` or ``role``/``content``) and, unless it is text only,
``image`` (a path or a list of paths) or ``video`` (a path, with an optional clip from ``start`` to ``end`` seconds).
The resulting :class:`Annotation`:

* roles are ``human``, ``gpt`` and ``system``
* every media item has one ``<image>`` placeholder, also a video; ``<video>`` is converted or refused
* a single media item without a placeholder gets one at the start of the first human turn, as such files mean it
* media paths are relative, and do not leave their root
* all other fields are in ``meta``

A sample that cannot be used is yielded as an :class:`AnnotationError` with its reason, never dropped silently.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, normalize, sample_id
from framestream.pipeline.annotations.surrogates import SurrogateFilter
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.subset import select_subset

COMPRESSED = (".gz", ".zst")


class AnnotationFileError(ValueError):
    """An annotation file that cannot be read, or not to its end: one line with the file and the fix."""


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
        AnnotationFileError: the file cannot be read, has an unknown suffix, or is broken.
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
        if _content_suffix(path) == ".parquet":
            return pq.read_metadata(path).num_rows
        if _content_suffix(path) == ".jsonl":
            with _open(path) as file:
                return sum(1 for line in file if line.strip())
    return sum(1 for _ in _read_samples(path))


# Files ----------------------------------------------------------------------------------------------------------------


def _content_suffix(path: Path) -> str:
    """Return the suffix that states a file's format, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"), 1 << 20)


def _read_samples(path: Path) -> Iterator[Any]:
    """Yield every sample as a plain value, and an AnnotationError for a line of JSON lines that is not valid JSON."""
    kind = _content_suffix(path)
    with _ReadErrors(path):
        if kind == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif kind in (".json", ".jsonl"):
            with _open(path) as file:
                yield from _json_list(path, file) if kind == ".json" else _json_lines(file)
        else:
            raise AnnotationFileError(f"{path}: unknown annotation format; use .json, .jsonl or .parquet")


def _json_list(path: Path, file: io.BufferedReader) -> Iterator[Any]:
    head = b""
    while not head and (line := file.readline(1 << 16)):
        head = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        return
    if not head.startswith(b"["):
        raise AnnotationFileError(f"{path}: expected a JSON list of samples; name a file of JSON lines .jsonl")
    yield from ijson.items(SurrogateFilter(head, file), "item", use_float=True)


def _json_lines(file: io.BufferedReader) -> Iterator[Any]:
    for line in file:
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield AnnotationError("bad_sample", f"the line is not JSON ({_one_line(error)})")


class _ReadErrors:
    """Convert the errors that readers raise for a broken file into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise AnnotationFileError(f"{self._path}: no such annotation file; correct its path or fetch it")
        if isinstance(error, (ijson.JSONError, pa.ArrowException, OSError, UnicodeDecodeError, RecursionError)):
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


# Samples --------------------------------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
