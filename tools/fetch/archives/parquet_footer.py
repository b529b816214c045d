"""The directory at the end of a parquet file, of which little is needed, in Thrift's compact protocol.

pyarrow hands out the same numbers, but ends the process where some of a damaged directory are wrong
(``parquet::ParquetException`` out of ``RowGroupMetaData.column``, pyarrow 26).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _, _STRUCT = range(1, 13)
_DEEPEST = 32  # structures in structures


class ColumnChunk(NamedTuple):
    """A column of a row group; bytes."""

    start: int
    packed: int
    size: int  #: unpacked


class RowGroup(NamedTuple):
    """A row group."""

    rows: int
    chunks: dict[str, ColumnChunk]  #: by column, ``image.bytes`` for a column of a structure


def read_footer(data: bytes, columns: Collection[str]) -> tuple[int, list[RowGroup]]:
    """Rows and row groups of a file with the directory ``data`` (FileMetaData of parquet.thrift).

    Args:
        columns: those whose chunks are wanted.

    Raises:
        ValueError, LookupError: it is damaged.
    """
    stream, rows, groups = _Compact(data), -1, []
    for field, kind in stream.fields():
        if (field, kind) == (3, _I64):
            rows = stream.integer()
        elif (field, kind) == (4, _LIST):
            groups = [_row_group(stream, columns) for _ in stream.items(_STRUCT)]
        else:
            stream.skip(kind)
    return rows, groups


def _row_group(stream: _Compact, columns: Collection[str]) -> RowGroup:
    rows, chunks = -1, {}
    for field, kind in stream.fields():
        if (field, kind) == (3, _I64):
            rows = stream.integer()
        elif (field, kind) == (1, _LIST):
            found = [_chunk(stream) for _ in stream.items(_STRUCT)]
            chunks = {name: chunk for name, chunk in found if name in columns}
        else:
            stream.skip(kind)
    if rows < 0:
        raise ValueError(f"{rows} rows in a row group")
    return RowGroup(rows, chunks)


def _chunk(stream: _Compact) -> tuple[str, ColumnChunk]:
    """A ColumnChunk, whose field 3 is the ColumnMetaData."""
    name, numbers = "", {}
    for field, kind in stream.fields():
        if (field, kind) != (3, _STRUCT):
            stream.skip(kind)
            continue
        for inner, inner_kind in stream.fields():
            if (inner, inner_kind) == (3, _LIST):
                name = ".".join(stream.text() for _ in stream.items(_BINARY))
            elif inner_kind == _I64:
                numbers[inner] = stream.integer()
            else:
                stream.skip(inner_kind)
    start = min(numbers[9], numbers.get(11) or numbers[9])  # data pages, and before them the dictionary
    chunk = ColumnChunk(start, numbers[7], numbers[6])
    if min(chunk) < 0:
        raise ValueError(f"a column with {chunk}")
    return name, chunk


class _Compact:
    """Values of the compact protocol, one after the other (thrift-compact-protocol.md of Apache Thrift)."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and kind of each field of a structure, whose value is read or skipped before the next."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 15

    def items(self, kind: int) -> range:
        """A list whose items are of ``kind`` and are read next."""
        found, count = self._list()
        if found != kind:
            raise ValueError(f"a list of kind {found} where {kind} is due")
        return range(count)

    def integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def text(self) -> str:
        start = self._skip_bytes(self._varint())
        return self._data[start : self._place].decode("utf-8", "replace")

    def skip(self, kind: int, depth: int = 0, item: bool = False) -> None:
        """Pass over a value; a truth value takes a byte only as an item of a list."""
        if depth > _DEEPEST:
            raise ValueError("structures in structures without end")
        if kind in (_TRUE, _FALSE):
            self._skip_bytes(int(item))
        elif kind in (_BYTE, _DOUBLE):
            self._skip_bytes(8 if kind == _DOUBLE else 1)
        elif kind in (_I16, _I32, _I64):
            self._varint()
        elif kind == _BINARY:
            self._skip_bytes(self._varint())
        elif kind in (_LIST, _SET):
            found, count = self._list()
            for _ in range(count):
                self.skip(found, depth + 1, item=True)
        elif kind == _STRUCT:
            for _, found in self.fields():
                self.skip(found, depth + 1)
        else:
            raise ValueError(f"a value of kind {kind}, which parquet does not have")

    def _list(self) -> tuple[int, int]:
        head = self._byte()
        return head & 15, head >> 4 if head < 0xF0 else self._varint()

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _skip_bytes(self, size: int) -> int:
        """Where these bytes begin."""
        start = self._place
        self._place += size
        if self._place > len(self._data):
            raise ValueError("ends early")
        return start

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
