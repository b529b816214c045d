"""Parse the few needed fields of a parquet footer (FileMetaData) and of page headers, in Thrift's compact protocol.

pyarrow returns the same numbers of a footer, but ends the process if some of them are wrong in a damaged one
(``parquet::ParquetException`` out of ``RowGroupMetaData.column``, pyarrow 26). It does not return page headers, whose
sizes decide how much memory reading takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import pyarrow as pa

MAGIC = b"PAR1"  #: first and last bytes of a file
TRAILER = 8  #: bytes at the end of a file: the size of the footer (4 bytes, little-endian) and MAGIC

#: Type codes of the compact protocol (thrift-compact-protocol.md). 11 is a map, which parquet does not use.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _, _STRUCT = range(1, 13)
_MAX_DEPTH = 32  # of nested structures

#: Field ids of parquet.thrift, by structure.
_FILE_NUM_ROWS, _FILE_ROW_GROUPS = 3, 4
_GROUP_COLUMNS, _GROUP_NUM_ROWS = 1, 3
_CHUNK_META_DATA = 3
_META_TYPE, _META_CODEC = 1, 4
_META_PATH_IN_SCHEMA, _META_NUM_VALUES, _META_UNCOMPRESSED_SIZE, _META_COMPRESSED_SIZE = 3, 5, 6, 7
_META_DATA_PAGE_OFFSET, _META_DICTIONARY_PAGE_OFFSET = 9, 11
_PAGE_UNCOMPRESSED_SIZE, _PAGE_COMPRESSED_SIZE = 2, 3
_DATA_HEADERS, _DICTIONARY_HEADER = (5, 8), 7  # of pages of both versions, of a dictionary
_HEADER_NUM_VALUES = 1

_BYTE_ARRAY = 6  #: the physical type of texts and bytes
_CODECS = {
    0: None,
    1: "snappy",
    2: "gzip",
    4: "brotli",
    6: "zstd",
    7: "lz4_raw",
}  #: those that dictionaries are read of
_MAX_DICTIONARY = 64 << 20  # bytes of a dictionary that is looked into
_MIN_HEADER_READ, _MAX_HEADER_READ = 1 << 9, 1 << 20  # bytes; a page header may contain statistics


class ColumnChunk(NamedTuple):
    """One column of a row group; offset and sizes in bytes."""

    start: int
    packed: int  #: compressed size
    size: int  #: uncompressed size
    values: int  #: number of values, nulls included
    type: int = -1  #: physical type, by its number in parquet.thrift
    codec: int = -1  #: compression, by its number in parquet.thrift


class PageTotals(NamedTuple):
    """What the pages of a column chunk add up to, by their own headers."""

    values: int  #: number of values, without those of dictionaries
    size: int  #: uncompressed bytes
    largest: int  #: bytes of a text in a dictionary, at most; each value may be such a text


class RowGroup(NamedTuple):
    """Rows and column chunks of a row group."""

    rows: int
    chunks: dict[str, ColumnChunk]  #: by column; ``image.bytes`` for a column within a structure


def read_footer(data: bytes, columns: Collection[str] | None = None) -> tuple[int, list[RowGroup]]:
    """Return rows and row groups of a file with the footer ``data`` (FileMetaData of parquet.thrift).

    Args:
        columns: the columns whose chunks are returned; all if None.

    Raises:
        ValueError, LookupError: the footer is damaged, or has two columns of one name.
    """
    reader, rows = _CompactReader(data), -1
    groups: list[RowGroup] = []
    for field, kind in reader.fields():
        if (field, kind) == (_FILE_NUM_ROWS, _I64):
            rows = reader.integer()
        elif (field, kind) == (_FILE_ROW_GROUPS, _LIST):
            groups = [_read_row_group(reader, columns) for _ in reader.items(_STRUCT)]
        else:
            reader.skip(kind)
    return rows, groups


def _read_row_group(reader: _CompactReader, columns: Collection[str] | None) -> RowGroup:
    rows = -1
    chunks: dict[str, ColumnChunk] = {}
    for field, kind in reader.fields():
        if (field, kind) == (_GROUP_NUM_ROWS, _I64):
            rows = reader.integer()
        elif (field, kind) == (_GROUP_COLUMNS, _LIST):
            all_chunks = [_read_chunk(reader) for _ in reader.items(_STRUCT)]
            for name, chunk in all_chunks:
                if columns is None or name in columns:
                    if name in chunks:
                        raise ValueError(f"two columns are named {name:.100}; rename one")
                    chunks[name] = chunk
        else:
            reader.skip(kind)
    if rows < 0:
        raise ValueError(f"{rows} rows in a row group")
    return RowGroup(rows, chunks)


def _read_chunk(reader: _CompactReader) -> tuple[str, ColumnChunk]:
    """Read a ColumnChunk, which contains a ColumnMetaData."""
    name = ""
    numbers: dict[int, int] = {}  # by field of ColumnMetaData
    for field, kind in reader.fields():
        if (field, kind) != (_CHUNK_META_DATA, _STRUCT):
            reader.skip(kind)
            continue
        for meta_field, meta_kind in reader.fields():
            if (meta_field, meta_kind) == (_META_PATH_IN_SCHEMA, _LIST):
                name = ".".join(reader.text() for _ in reader.items(_BINARY))
            elif meta_kind == _I64 or (meta_kind == _I32 and meta_field in (_META_TYPE, _META_CODEC)):
                numbers[meta_field] = reader.integer()
            else:
                reader.skip(meta_kind)
    # A chunk begins with its dictionary page if it has one. Some writers state 0 if there is none.
    data_page = numbers[_META_DATA_PAGE_OFFSET]
    start = min(data_page, numbers.get(_META_DICTIONARY_PAGE_OFFSET) or data_page)
    sizes = numbers[_META_COMPRESSED_SIZE], numbers[_META_UNCOMPRESSED_SIZE]
    kinds = numbers.get(_META_TYPE, -1), numbers.get(_META_CODEC, -1)
    chunk = ColumnChunk(start, *sizes, numbers[_META_NUM_VALUES], *kinds)
    if min(chunk[:4]) < 0:
        raise ValueError(f"a column with {chunk}")
    return name, chunk


def add_up_pages(
    read: Callable[[int, int], bytes], chunk: ColumnChunk, look_into_dictionaries: bool = True
) -> PageTotals:
    """Return what the pages of a column chunk add up to. Of their data, at most dictionaries are read.

    Args:
        read: returns bytes from an offset, fewer only at the end of the file.
        look_into_dictionaries: read them; otherwise a dictionary may be one text.

    Raises:
        ValueError, LookupError, OSError: a page header or dictionary is damaged.
    """
    values, size, largest, position = 0, 0, 0, chunk.start
    while position < chunk.start + chunk.packed:
        page = _read_page_header(read, position)
        position += page.header
        values, size = values + page.values, size + page.size
        if page.is_dictionary and chunk.type == _BYTE_ARRAY:
            found = _largest_text(page, chunk.codec, read, position) if look_into_dictionaries else page.size
            largest = max(largest, found)
        position += page.packed
    return PageTotals(values, size, largest)


class _Page(NamedTuple):
    header: int  # bytes of the header
    packed: int  # bytes of the data
    size: int  # uncompressed bytes
    values: int  # number of values; 0 for a dictionary
    is_dictionary: bool


def _largest_text(page: _Page, codec: int, read: Callable[[int, int], bytes], position: int) -> int:
    """Return the bytes of the largest text of a dictionary: each is its length (4 bytes, little-endian) and its bytes.

    A dictionary that cannot be looked into may be one text.
    """
    if codec not in _CODECS or page.size > _MAX_DICTIONARY:
        return page.size
    name, data = _CODECS[codec], read(position, page.packed)
    if name:
        data = pa.Codec(name).decompress(data, page.size, asbytes=True)
    position = largest = 0
    while position + 4 <= len(data):
        length = int.from_bytes(data[position : position + 4], "little")
        largest = max(largest, length)
        position += 4 + length
    return min(largest, page.size)


def _read_page_header(read: Callable[[int, int], bytes], position: int) -> _Page:
    length = _MIN_HEADER_READ
    while True:
        data = read(position, length)
        try:
            return _parse_page_header(_CompactReader(data))
        except (ValueError, LookupError):
            if len(data) < length or length >= _MAX_HEADER_READ:
                raise
            length *= 8


def _parse_page_header(reader: _CompactReader) -> _Page:
    sizes: dict[int, int] = {}
    values, is_dictionary = 0, False
    for field, kind in reader.fields():
        if kind == _I32:
            sizes[field] = reader.integer()
        elif kind == _STRUCT and field in _DATA_HEADERS:
            for header_field, header_kind in reader.fields():
                if (header_field, header_kind) == (_HEADER_NUM_VALUES, _I32):
                    values += reader.integer()
                else:
                    reader.skip(header_kind)
        else:
            is_dictionary |= field == _DICTIONARY_HEADER
            reader.skip(kind)
    packed, size = sizes[_PAGE_COMPRESSED_SIZE], sizes[_PAGE_UNCOMPRESSED_SIZE]
    if min(packed, size, values) < 0:
        raise ValueError(f"a page of {packed} bytes, {size} unpacked, with {values} values")
    return _Page(reader.position, packed, size, values, is_dictionary)


class _CompactReader:
    """Read values of the compact protocol in sequence (thrift-compact-protocol.md of Apache Thrift)."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    def fields(self) -> Iterator[tuple[int, int]]:
        """Yield id and type of each field of a structure. The caller reads or skips each value before the next one.

        The header of a field is one byte. Its high 4 bits are the difference to the previous field id, or 0 if the id
        follows as an integer; its low 4 bits are the type. A zero byte ends the structure.
        """
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 15

    def items(self, kind: int) -> range:
        """Read the header of a list whose items must be of type ``kind``. The caller reads each item."""
        item_kind, count = self._list_header()
        if item_kind != kind:
            raise ValueError(f"a list of type {item_kind}, expected {kind}")
        return range(count)

    def integer(self) -> int:
        """Read a signed integer: a varint in zigzag encoding (0, -1, 1, -2 ... are 0, 1, 2, 3 ...)."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def text(self) -> str:
        """Read a binary value as UTF-8: a varint with its length, then its bytes."""
        start = self._skip_bytes(self._varint())
        return self._data[start : self._position].decode("utf-8", "replace")

    def skip(self, kind: int, depth: int = 0, is_item: bool = False) -> None:
        """Skip a value. A boolean takes a byte only as an item of a list; as a field, its type is its value."""
        if depth > _MAX_DEPTH:
            raise ValueError(f"structures nested more than {_MAX_DEPTH} deep")
        if kind in (_TRUE, _FALSE):
            self._skip_bytes(int(is_item))
        elif kind in (_BYTE, _DOUBLE):
            self._skip_bytes(8 if kind == _DOUBLE else 1)
        elif kind in (_I16, _I32, _I64):
            self._varint()
        elif kind == _BINARY:
            self._skip_bytes(self._varint())
        elif kind in (_LIST, _SET):
            item_kind, count = self._list_header()
            for _ in range(count):
                self.skip(item_kind, depth + 1, is_item=True)
        elif kind == _STRUCT:
            for _, field_kind in self.fields():
                self.skip(field_kind, depth + 1)
        else:
            raise ValueError(f"a value of type {kind}, which parquet does not have")

    def _list_header(self) -> tuple[int, int]:
        """Read type and number of the items: the low and high 4 bits of a byte.

        If the high bits are 15, the number follows as a varint.
        """
        head = self._byte()
        return head & 15, head >> 4 if head < 0xF0 else self._varint()

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _skip_bytes(self, size: int) -> int:
        """Skip bytes. Return the offset of the first one."""
        start = self._position
        self._position += size
        if self._position > len(self._data):
            raise ValueError("the footer ends early")
        return start

    def _varint(self) -> int:
        """Read an unsigned integer: 7 bits per byte, lowest first; the high bit means that another byte follows."""
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("an integer of more than 64 bits")
