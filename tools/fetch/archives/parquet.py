"""Read images from parquet files as datasets on the hub store them: one image in each row.

A file has a column ``image`` of {bytes: binary, path: string} and usually a column ``id``. The small columns of names
of each row group are read once. An image then costs the image column of its row group, up to its row. Most writers put
that entire column into one page. A page is therefore unpacked completely, and the next images are taken from it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice

import pyarrow as pa
import pyarrow.parquet as pq

from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.pipeline.utils.parquet_footer import MAGIC, TRAILER, PageTotals, add_up_pages, read_footer
from framestream.tools.fetch.archives.member_table import ROW, ArchiveMember
from framestream.tools.fetch.archives.parquet_rows import row_paths
from framestream.tools.fetch.archives.readahead import RandomAccessStream
from framestream.tools.fetch.base import UNKNOWN, FetchError, RandomAccessFile

MAX_FOOTER = 32 << 20  #: bytes
MAX_ROWS = 1 << 26  #: of a file
MAX_PAGE = 1 << 30  #: bytes read at once, which is a packed page; by the format it unpacks to less than 2 GiB
#: A column of a row group, and all names, may unpack to MAX_RATIO times their size plus RATIO_SLACK bytes.
MAX_RATIO, RATIO_SLACK = 20, 1 << 28

_MIN_FILE = len(MAGIC) + TRAILER  # bytes of a file without rows and footer
_TAIL = 1 << 16  # bytes; what pyarrow reads first
_BUFFER = 1 << 18  # bytes; larger pages are read at once
_NAME_BATCH = 4096  # rows of names taken from a page at once
_IMAGE_BATCH = 1 << 20  # bytes of images taken from a page at once, on average
_GROUPS_AHEAD, _THREADS = 16, 8  # row groups whose names are read at once, and the threads that read them
_SMALL_COLUMN = 1 << 20  # bytes; smaller columns of names are read by one request
_OPEN_GROUPS = 2  # row groups of this process that are open
_CACHED_IMAGES = 32 << 20  # bytes of images cached for each open row group
_IMAGE_OVERHEAD = 100  # bytes that an image costs in the cache, besides its own
_CACHED_FOOTERS = 4
_DAMAGED = "the parquet file is damaged; fetch it again"

#: What pyarrow raises on damaged files.
_PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError, MemoryError)


def list_parquet(file: RandomAccessFile, file_id: str, notes: list[str]) -> Iterator[tuple[str, ArchiveMember]]:
    """Yield the names of every row with an image, and its member, whose offset is the row.

    Args:
        file_id: see :func:`framestream.tools.fetch.archives.parquet_rows.row_paths`, which makes the names.
        notes: problems of single row groups are appended to it.

    Raises:
        FetchError: truncated, corrupt, too_large; unsupported, if the file has no such columns.
    """
    parquet = _ParquetFile(file)
    remaining, nameless = MAX_RATIO * file.size + RATIO_SLACK, 0  # bytes that further names may have
    with DaemonThreadPool(_THREADS) as threads:
        for first in range(0, parquet.group_count, _GROUPS_AHEAD):
            groups = range(first, min(first + _GROUPS_AHEAD, parquet.group_count))
            for group, columns in zip(groups, threads.map(parquet.read_name_columns, groups), strict=True):
                try:
                    for row, stored_path, row_id in parquet.names(group, columns):
                        paths = list(row_paths(stored_path, row_id, file_id, row))
                        nameless += not paths
                        remaining -= sum(map(len, paths)) + 64 * len(paths)  # 64: the other columns of the table
                        if remaining < 0:
                            message = f"its names are over {MAX_RATIO} times its size; split the file"
                            raise FetchError("too_large", file.name, message)
                        for path in paths:
                            yield path, ArchiveMember(0, row, UNKNOWN, 0, 0, ROW)
                except _PARQUET_ERRORS as error:
                    message = f"the names of row group {group} cannot be read ({_error_line(error)})"
                    notes.append(f"{file.name}: {message}; its images are lost; fetch it again")
    if nameless:
        notes.append(f"{file.name}: {nameless} images have neither a path nor an id to be found by")


class ParquetImages:
    """The images of parquet files, by file and row. Threads may share it.

    Two row groups per process are open, those read last. Of each, the current page and the last 32 MiB of images before
    it are cached for neighbors.

    Args:
        names: a unique name for each file.
        limit: bytes of an image.
    """

    def __init__(self, files: Sequence[RandomAccessFile], names: Sequence[str], limit: int) -> None:
        self._files, self._names, self._limit = files, names, limit
        self._lock = threading.Lock()  # guards _opened
        self._opened: OrderedDict[int, _ParquetFile] = OrderedDict()  # by number, least recently used first

    def read(self, number: int, row: int, location: str) -> bytes | None:
        """Return the image in a row of file ``number``, or None if the row has none.

        Raises:
            FetchError: too_large, for an image over ``limit`` bytes; corrupt; and what reading the file raises.
        """
        parquet = self._open(number)
        group, row_in_group = parquet.locate(row)
        reader = _open_groups.get(
            (self._names[number], group),
            lambda: _RowGroupReader(lambda: parquet.images(group), parquet.row_count(group)),
        )
        try:
            image = reader.image(row_in_group)
        except _PARQUET_ERRORS as error:
            raise FetchError("corrupt", location, f"{_DAMAGED} ({_error_line(error)})") from None
        if image is not None and len(image) > self._limit:
            message = f"{len(image)} bytes, where {self._limit} are allowed (data.fetch_mb)"
            raise FetchError("too_large", location, message)
        return image

    def _open(self, number: int) -> _ParquetFile:
        with self._lock:
            if number in self._opened:
                self._opened.move_to_end(number)
            else:
                self._opened[number] = _ParquetFile(self._files[number])
                if len(self._opened) > _CACHED_FOOTERS:
                    self._opened.popitem(last=False)
            return self._opened[number]


# Files ----------------------------------------------------------------------------------------------------------------


class _ParquetFile:
    """A parquet file with its footer, which is checked.

    The file is MAGIC, the pages of all column chunks, the footer, its size and MAGIC.

    Raises:
        FetchError: as :func:`list_parquet`.
    """

    def __init__(self, file: RandomAccessFile) -> None:
        self._file = file
        tail = file.read(max(file.size - _TAIL, 0), _TAIL)
        if file.size < _MIN_FILE or not tail.endswith(MAGIC):
            raise FetchError("truncated", file.name, "the parquet file has no footer at its end; fetch it again")
        footer = int.from_bytes(tail[-TRAILER : -len(MAGIC)], "little")
        if footer > file.size - _MIN_FILE:
            raise FetchError("corrupt", file.name, f"{_DAMAGED}: its footer is longer than the file")
        if footer > MAX_FOOTER:
            message = f"its footer has {footer} bytes, over {MAX_FOOTER}; split the file"
            raise FetchError("too_large", file.name, message)
        if footer + TRAILER > len(tail):
            tail = file.read(file.size - footer - TRAILER, footer + TRAILER)
        try:
            opened = self._open({file.size - len(tail): tail})
            self._metadata, self._name_columns = opened.metadata, _find_name_columns(file, opened.schema_arrow)
            needed = {*self._name_columns, "image.bytes"}
            rows, self._groups = read_footer(tail[-TRAILER - footer : -TRAILER], needed)
            if any(group.chunks.keys() != needed for group in self._groups):
                raise ValueError("a row group lacks a column")
            for column in needed:
                if sum(group.chunks[column].packed for group in self._groups) > file.size:
                    raise ValueError(f"its row groups have more of column {column} than the file has bytes")
        except _PARQUET_ERRORS as error:
            raise FetchError("corrupt", file.name, f"{_DAMAGED} ({_error_line(error)})") from None
        self.group_count = len(self._groups)
        self._starts = [0, *accumulate(group.rows for group in self._groups)]
        if self._starts[-1] != rows or self._metadata.num_row_groups != self.group_count:
            message = f"{_DAMAGED}: the rows of its row groups do not add up to those of the file"
            raise FetchError("corrupt", file.name, message)
        if rows > MAX_ROWS:
            raise FetchError("too_large", file.name, f"has {rows} rows, over {MAX_ROWS}; split the file")

    def locate(self, row: int) -> tuple[int, int]:
        """Return the row group of a row, and the row's position in it."""
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def row_count(self, group: int) -> int:
        """Return the number of rows of a row group."""
        return self._groups[group].rows

    def read_name_columns(self, group: int) -> dict[int, bytes]:
        """Return the columns of names of a row group, by offset.

        Columns that are not small, or that the footer places outside of the file, are left out and read later.
        """
        columns = {}
        for name in self._name_columns:
            chunk = self._groups[group].chunks[name]
            if chunk.packed <= _SMALL_COLUMN and chunk.start + chunk.packed <= self._file.size:
                columns[chunk.start] = self._file.read(chunk.start, chunk.packed)
        return columns

    def names(self, group: int, columns_read: dict[int, bytes]) -> Iterator[tuple[int, str | None, str | None]]:
        """Yield row, path and id of each image of a row group.

        Args:
            columns_read: what :meth:`read_name_columns` returned.
        """
        row, rows = self._starts[group], _NAME_BATCH
        for column in self._name_columns:
            totals = self._check_pages(group, column, columns_read)
            self._check_ratio(group, column, totals.values * totals.largest)
            rows = max(min(rows, _IMAGE_BATCH // max(totals.largest, 1)), 1)
        for batch in self._batches(group, self._name_columns, rows, columns_read):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            valid = columns["image"].is_valid().to_pylist() if "image" in columns else [True] * len(batch)
            paths = _to_texts(columns["image"].field("path")) if "image" in columns else [None] * len(batch)
            row_ids = _to_texts(columns["id"]) if "id" in columns else [None] * len(batch)
            for number, (is_valid, path, row_id) in enumerate(zip(valid, paths, row_ids, strict=True), row):
                if is_valid:
                    yield number, path, row_id
            row += len(batch)
        if row != self._starts[group + 1]:
            raise ValueError(f"rows end at {row}, not {self._starts[group + 1]}")

    def images(self, group: int) -> Iterator[bytes | None]:
        """Yield the image of each row of a row group; None for a row without one."""
        totals = self._check_pages(group, "image.bytes", {})
        average = totals.size // max(self._groups[group].rows, 1)
        rows = max(min(_IMAGE_BATCH // max(average, totals.largest, 1), _NAME_BATCH), 1)
        size = 0
        for batch in self._batches(group, ("image.bytes",), rows, {}):
            for value in batch.column(0):
                image = value["bytes"].as_py() if value.is_valid else None
                size += len(image or b"")
                self._check_ratio(group, "image.bytes", size)
                yield image

    def _batches(
        self, group: int, columns: Sequence[str], rows: int, ranges_read: dict[int, bytes]
    ) -> Iterator[pa.RecordBatch]:
        opened = self._open(ranges_read, self._metadata)
        return opened.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)

    def _open(self, ranges_read: dict[int, bytes], metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(
            _PrefetchedStream(self._file, ranges_read),
            metadata=metadata,
            buffer_size=_BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,
        )

    def _check_pages(self, group: int, column: str, ranges_read: dict[int, bytes]) -> PageTotals:
        """Return what the pages of a column add up to, which is checked: pyarrow unpacks whatever they state."""
        stream, chunk = _PrefetchedStream(self._file, ranges_read), self._groups[group].chunks[column]

        def read(offset: int, size: int) -> bytes:
            stream.seek(offset)
            return stream.read(size)

        totals = add_up_pages(read, chunk, look_into_dictionaries=column != "image.bytes")
        self._check_ratio(group, column, max(chunk.size, totals.size))
        return totals

    def _check_ratio(self, group: int, column: str, size: int) -> None:
        """Refuse a column of a row group that unpacks to ``size`` bytes, with each use of a dictionary counted."""
        if size > MAX_RATIO * self._groups[group].chunks[column].packed + RATIO_SLACK:
            message = f"row group {group} unpacks to {size} bytes of {column}, over {MAX_RATIO} times its size"
            raise FetchError("too_large", self._file.name, message)


def _find_name_columns(file: RandomAccessFile, schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns that contain names, after a check that there is a column of images."""
    names = [field.name for field in schema]
    image = schema.field("image").type if names.count("image") == 1 else None
    fields = {} if image is None or not pa.types.is_struct(image) else {field.name: field.type for field in image}
    if "bytes" not in fields or not (pa.types.is_binary(fields["bytes"]) or pa.types.is_large_binary(fields["bytes"])):
        message = f"the parquet file has no column image of {{bytes, path}}; its columns are {', '.join(names)[:200]}"
        raise FetchError("unsupported", file.name, message)
    columns = ["image.path"] if "path" in fields and _is_text(fields["path"]) else []
    columns += ["id"] if names.count("id") == 1 and _is_text(schema.field("id").type) else []
    if not columns:
        raise FetchError("unsupported", file.name, "the parquet file has neither image.path nor id to find images by")
    return tuple(columns)


def _is_text(column_type: pa.DataType) -> bool:
    """Return whether values of a column can be names: texts or integers."""
    column_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type) or pa.types.is_integer(column_type)


def _to_texts(column: pa.Array) -> list[str | None]:
    """Return texts or integers as texts. Bytes that are not UTF-8 become surrogates, as in Python's file names."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    binary = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in binary.to_pylist()]


class _PrefetchedStream(RandomAccessStream):
    """A file object for pyarrow. Byte ranges that were read before (bytes by offset) are not read again."""

    def __init__(self, file: RandomAccessFile, ranges_read: dict[int, bytes]) -> None:
        super().__init__(file)
        self._ranges_read = ranges_read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PAGE:
            raise FetchError("too_large", self._file.name, f"a read of {size} bytes at once, over {MAX_PAGE}")
        offset = self._position
        for start, data in self._ranges_read.items():
            if start <= offset and offset + size <= start + len(data):
                data = data[offset - start : offset - start + size]
                break
        else:
            data = self._file.read(offset, size)
        self._position += len(data)
        return data


# Row groups -----------------------------------------------------------------------------------------------------------


class _RowGroupReader:
    """Reads the images of a row group in sequence, and caches the last ones.

    Args:
        start: starts reading at the first row.
        rows: rows of the row group.
    """

    def __init__(self, start: Callable[[], Iterator[bytes | None]], rows: int) -> None:
        self._start, self._rows = start, rows
        self._images: Iterator[bytes | None] = iter(())  # from row _next on
        self._next = 0
        self._cached: OrderedDict[int, bytes | None] = OrderedDict()  # by row, oldest first
        self._cached_bytes = 0
        # Held while images are read: threads that need the same row group wait, instead of unpacking its page again.
        self._lock = threading.Lock()

    def image(self, row: int) -> bytes | None:
        """Return the image of a row. A row before the last one read, and not cached, starts from the first row."""
        with self._lock:
            if row in self._cached:
                return self._cached[row]
            if not self._next or row < self._next:
                self._images, self._next = self._start(), 0
            try:
                for image in islice(self._images, row + 1 - self._next):
                    self._cache_image(image)
                    if self._next > row:
                        return image
                raise ValueError(f"the row group ends before row {row}")
            except BaseException:
                self._next = 0  # the next call starts again; the server may be back by then
                raise

    def _cache_image(self, image: bytes | None) -> None:
        """Cache the image of row ``_next`` and go to the next row."""
        if self._next in self._cached:
            self._cached_bytes -= _cache_cost(self._cached.pop(self._next))
        self._cached[self._next] = image
        self._cached_bytes += _cache_cost(image)
        while self._cached_bytes > _CACHED_IMAGES:
            self._cached_bytes -= _cache_cost(self._cached.popitem(last=False)[1])
        self._next += 1
        if self._next == self._rows:
            self._images = iter(())  # frees the page


def _cache_cost(image: bytes | None) -> int:
    """Return the bytes that caching an image takes."""
    return _IMAGE_OVERHEAD + len(image or b"")


class _RowGroupCache:
    """The row groups of a process that were used last.

    One cache serves all sources. Pages take most of the memory, and a build reads one source after the other.
    """

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._readers: OrderedDict[tuple[str, int], _RowGroupReader] = OrderedDict()

    def get(self, key: tuple[str, int], make: Callable[[], _RowGroupReader]) -> _RowGroupReader:
        """Return the reader of a row group, by name of the file and number of the row group."""
        with self._lock:
            self._readers[key] = reader = self._readers.pop(key, None) or make()
            while len(self._readers) > self._size:
                self._readers.popitem(last=False)
            return reader


_open_groups = _RowGroupCache(_OPEN_GROUPS)


def _error_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
