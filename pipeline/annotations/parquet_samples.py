"""Samples of parquet files: each row as plain values, whatever the types of its columns.

How much a file unpacks to is known from its page headers and dictionaries before anything else is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framestream.pipeline.annotations.json_samples import MAX_SAMPLE
from framestream.pipeline.annotations.normalize import AnnotationError
from framestream.pipeline.annotations.text_files import AnnotationFileError, max_unpacked
from framestream.pipeline.utils.parquet_footer import MAGIC, TRAILER, add_up_pages, read_footer

BATCH_ROWS = 1024  #: rows that are unpacked at once, at most
BATCH_BYTES = 64 << 20  #: bytes of texts from a dictionary that are unpacked at once, but for one row
MAX_FOOTER = 32 << 20  #: bytes
MAX_TEXT_RATIO, MIN_TEXT_LIMIT = 10_000, 256 << 20  #: bytes of texts for each byte of a file; what any file may have

_UNPACKS = "unpacks to much more than its size; write it with fewer repeated texts, or as .jsonl.zst"
_TOO_LONG = f"the row is larger than {MAX_SAMPLE:,} bytes"


class _Bounds(NamedTuple):
    rows: int  # of the file
    batch_rows: int  # that may be unpacked at once


def read_parquet_samples(path: Path) -> Iterator[Any]:
    """Yield every row as a mapping, and an AnnotationError for one that is larger than a sample may be.

    Raises:
        AnnotationFileError: the file unpacks to too much.
        ValueError, OSError, pa.ArrowException: it is damaged.
    """
    bounds = _check_bounds(path)
    remaining = _max_texts(path.stat().st_size)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(bounds.batch_rows, use_threads=False):
            size = _unpacked_size(batch)
            remaining -= size
            if remaining < 0:
                raise AnnotationFileError(f"{path}: {_UNPACKS}")
            if size <= MAX_SAMPLE:
                yield from _to_rows(batch)
                continue
            for row in range(len(batch)):
                one = batch.slice(row, 1)
                is_larger = _unpacked_size(one) > MAX_SAMPLE
                yield AnnotationError("bad_sample", _TOO_LONG) if is_larger else _to_rows(one)[0]


def count_parquet_samples(path: Path) -> int:
    """Return the number of rows, after a check of what the file would unpack to.

    Raises:
        AnnotationFileError: it would unpack to too much.
        ValueError, LookupError, OSError: it is damaged.
    """
    return _check_bounds(path).rows


def _check_bounds(path: Path) -> _Bounds:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        rows, groups = read_footer(_read_footer_bytes(path, size, read))
        pages = [(group.rows, add_up_pages(read, chunk)) for group in groups for chunk in group.chunks.values()]
    for number in (rows, sum(page.values for _, page in pages), sum(page.size for _, page in pages)):
        if number > max_unpacked(size):
            raise AnnotationFileError(f"{path}: {_UNPACKS}")
    # A column with more values than rows has lists. How many values one row has is not known then.
    if any(page.values * page.largest > _max_texts(size) for group_rows, page in pages if page.values > group_rows):
        raise AnnotationFileError(f"{path}: {_UNPACKS}")
    if rows != sum(group.rows for group in groups):
        raise ValueError("the rows of its row groups do not add up to those of the file")
    largest = max((page.largest for _, page in pages), default=0)
    return _Bounds(rows, min(max(BATCH_BYTES // max(largest, 1), 1), BATCH_ROWS))


def _read_footer_bytes(path: Path, size: int, read: Callable[[int, int], bytes]) -> bytes:
    trailer = read(max(size - TRAILER, 0), TRAILER)
    footer = int.from_bytes(trailer[:4], "little")
    if not trailer.endswith(MAGIC) or size - TRAILER - footer < len(MAGIC):
        raise ValueError("it has no footer at its end")
    if footer > MAX_FOOTER:
        raise AnnotationFileError(f"{path}: its footer has {footer} bytes, over {MAX_FOOTER}; split the file")
    return read(size - TRAILER - footer, footer)


def _max_texts(size: int) -> int:
    return max(MAX_TEXT_RATIO * size, MIN_TEXT_LIMIT)


def _unpacked_size(values: pa.RecordBatch | pa.Array) -> int:
    """Return the bytes of values as they are without dictionaries, which Arrow counts once."""
    if isinstance(values, pa.RecordBatch):
        return sum(map(_unpacked_size, values.columns))
    if isinstance(values, pa.ExtensionArray):
        return _unpacked_size(values.storage)
    kind = values.type
    if pa.types.is_dictionary(kind):
        if not (pa.types.is_string(kind.value_type) or pa.types.is_binary(kind.value_type)):
            return values.nbytes
        return pc.sum(pc.binary_length(values.dictionary).take(values.indices).cast(pa.int64())).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(_unpacked_size(values.field(number)) for number in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _unpacked_size(values.flatten()) + 4 * len(values)
    return values.nbytes


def _to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    columns = [to_values(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def to_values(array: pa.Array) -> list[Any]:
    """Return the values of an Arrow array of any type as Python values.

    Times in nanoseconds and what Python has no value for become text. Bytes that are not UTF-8 become lone surrogates.
    """
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return to_values(array.storage)
    if pa.types.is_dictionary(kind):
        values = to_values(array.dictionary)
        return [None if index is None else values[index] for index in array.indices.to_pylist()]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        columns = [to_values(array.field(number)) for number in range(len(names))]
        rows = zip(*columns, strict=True) if columns else [()] * len(array)
        valid = array.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if exists else None for exists, row in zip(valid, rows, strict=True)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        starts = array.offsets.to_pylist()
        base = starts[0]
        items = to_values(_items(array, base, starts[-1]))
        if pa.types.is_map(kind):
            items = [list(item.values()) for item in items]
        spans = zip(array.is_valid().to_pylist(), starts, starts[1:], strict=False)
        return [items[start - base : end - base] if exists else None for exists, start, end in spans]
    if pa.types.is_fixed_size_list(kind):
        return [to_values(item.values) if item.is_valid else None for item in array]
    return _to_leaves(array)


def _items(array: pa.Array, start: int, end: int) -> pa.Array:
    """Return the items of lists, or the pairs of maps, from ``start`` to ``end``."""
    if not pa.types.is_map(array.type):
        return array.values.slice(start, end - start)
    pair = [part.slice(start, end - start) for part in (array.keys, array.items)]
    return pa.StructArray.from_arrays(pair, ["key", "value"])


def _to_leaves(array: pa.Array) -> list[Any]:
    if not (pa.types.is_temporal(array.type) and getattr(array.type, "unit", "") == "ns"):
        try:
            return array.to_pylist()
        except (ValueError, ArithmeticError, LookupError, pa.ArrowException):
            pass  # one of the values has no Python value, such as a date after the year 9999
    return [_to_leaf(value) if value.is_valid else None for value in array]


def _to_leaf(value: pa.Scalar) -> Any:
    if pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        return bytes(value.as_buffer()).decode("utf-8", "surrogateescape")
    if not (pa.types.is_temporal(value.type) and getattr(value.type, "unit", "") == "ns"):
        try:
            return value.as_py()
        except (ValueError, ArithmeticError, LookupError, pa.ArrowException):
            pass
    try:
        return pc.cast(value, pa.string()).as_py()
    except (ValueError, ArithmeticError, pa.ArrowException):
        number = getattr(value, "value", None)  # of a time: the number of its units
        return f"{number} {getattr(value.type, 'unit', value.type)}"
