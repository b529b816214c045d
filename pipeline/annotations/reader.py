"""Annotation files read into dialogues of one shape, whatever shape they were written in.

A file is a ``.json`` list, ``.jsonl`` lines or ``.parquet`` rows (the first two also ``.gz`` or ``.zst``) and is read
as a stream. A sample holds ``conversations`` (``from``/``value`` or ``role``/``content``) and, unless it is text only,
``image`` (a path or a list of paths) or ``video`` (a path, with an optional clip from ``start`` to ``end`` seconds).
What comes out:

* roles are ``human``, ``gpt`` and ``system``
* every media item has one ``<image>`` mark, for videos too; ``<video>`` is converted or refused
* one media item without any mark is put at the start of the first human turn, which is what such files mean
* media paths are relative, and stay below their root
* all other fields are kept as ``meta``

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

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, _id, normalize
from framestream.pipeline.annotations.surrogates import SurrogateFilter
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.subset import select_subset

COMPRESSED = (".gz", ".zst")


class AnnotationFileError(ValueError):
    """An annotation file that cannot be read at all or not to its end: one line with the file and the fix."""


def read_annotations(
    path: str | Path,
    entry: EntryConfig,
    *,
    placeholder: str = "convert",
    seed: int = 0,
    limit: int | None = None,
    compat: str = "none",
) -> Iterator[Annotation | AnnotationError]:
    """The samples of ``entry`` that its sampling strategy takes, in the order of the file ``path``.

    Args:
        path: where the entry's annotation file is on this machine.
        entry: names the root, the reader, the kinds of media and the sampling.
        placeholder: ``convert`` makes ``<video>`` an ``<image>`` mark, ``refuse`` makes it an error of the sample.
        seed: of ``random:N``.
        limit: take only the first so many of the samples that were selected.
        compat: ``published`` makes a first turn that is not ``from`` human or gpt an error of the sample.

    Raises:
        AnnotationFileError: the file cannot be read, is of no known kind, or is broken.
    """
    path = Path(path)
    samples: Iterator[tuple[int, Any]] = enumerate(_samples(path))
    if entry.sampling != "all":
        samples = _picked(samples, select_subset(entry.sampling, count_samples(path), seed))
    for position, sample in islice(samples, limit):
        try:
            if isinstance(sample, AnnotationError):
                raise sample
            yield normalize(sample, entry, position, placeholder, compat)
        except AnnotationError as error:
            error.entry, error.position = entry.name, position
            error.id = _id(sample, position)
            yield error


def count_samples(path: str | Path) -> int:
    """Number of samples in an annotation file (AnnotationFileError as :func:`read_annotations`)."""
    path = Path(path)
    with _explained(path):
        if _kind_of_file(path) == ".parquet":
            return pq.read_metadata(path).num_rows
        if _kind_of_file(path) == ".jsonl":
            with _opened(path) as file:
                return sum(1 for line in file if line.strip())
    return sum(1 for _ in _samples(path))


# Files ----------------------------------------------------------------------------------------------------------------


def _kind_of_file(path: Path) -> str:
    """The suffix that says what is in a file, compressed or not."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _opened(path: Path) -> io.BufferedReader:
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"), 1 << 20)


def _samples(path: Path) -> Iterator[Any]:
    """Every sample as a plain value; a line of JSON lines that is no JSON comes as an AnnotationError."""
    kind = _kind_of_file(path)
    with _explained(path):
        if kind == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif kind in (".json", ".jsonl"):
            with _opened(path) as file:
                yield from _json_list(path, file) if kind == ".json" else _json_lines(file)
        else:
            raise AnnotationFileError(f"{path}: unknown kind of annotation file; give .json, .jsonl or .parquet")


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


class _explained:
    """Turns what readers raise on a broken file into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise AnnotationFileError(f"{self._path}: no such annotation file; correct its path or fetch it")
        if isinstance(error, (ijson.JSONError, pa.ArrowException, OSError, UnicodeDecodeError, RecursionError)):
            raise AnnotationFileError(f"{self._path}: cannot be read to its end ({_one_line(error)}); fetch it again")


def _picked(samples: Iterator[tuple[int, Any]], positions: range | np.ndarray) -> Iterator[tuple[int, Any]]:
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
