"""Pictures in parquet files, as data sets of the hub hold them: a row, a picture.

A file has a column ``image`` of {bytes: binary, path: string} and mostly a column ``id``. Of each row group the small
columns of names are read once; a picture then costs the column of pictures of its row group, up to its row. Writers
mostly put all of that column into one page, so pages are unpacked whole, and the next pictures come out of them.
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
from framestream.tools.fetch.archives.member_table import ROW, ArchiveMember
from framestream.tools.fetch.archives.parquet_footer import read_footer
from framestream.tools.fetch.archives.parquet_rows import row_paths
from framestream.tools.fetch.archives.readahead import RandomAccessStream
from framestream.tools.fetch.base import UNKNOWN, FetchError, RandomAccessFile

MAGIC = b"PAR1"  #: first and last bytes of a file
MAX_FOOTER = 32 << 20  #: most bytes of the directory at a file's end
MAX_ROWS = 1 << 26  #: most rows of a file
MAX_PAGE = 1 << 30  #: most bytes read at once, which is a packed page; unpacked it has less than 2 GiB, by the format
MAX_RATIO, RATIO_SLACK = (
    20,
    1 << 28,
)  #: a column of a row group, and all names, may unpack to RATIO times their size and SPARE

_TAIL = 1 << 16  # bytes; what pyarrow reads first
_BUFFER = 1 << 18  # bytes; pages that are larger are read at once
_BATCH, _PICTURES = 4096, 1 << 20  # rows taken out of a page at once: of names; of pictures, bytes together
_AHEAD, _THREADS, _SMALL = 16, 8, 1 << 20  # row groups whose names are read at once, by so many; bytes of a column
_OPEN, _RECENT = 2, 32 << 20  # row groups of this process that are open; bytes of pictures kept of each
_TABLES = 4  # directories kept
_DAMAGED = "the parquet file is damaged; fetch it again"

#: What pyarrow raises on files that are none.
_BROKEN = (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError, MemoryError)


def list_parquet(file: RandomAccessFile, mark: str, notes: list[str]) -> Iterator[tuple[str, ArchiveMember]]:
    """The names of every row that has a picture, as :func:`framestream.tools.fetch.archives.parquet_rows.listed` makes them, and its member, whose
    offset is the row; what is wrong with single row groups into ``notes``.

    Raises:
        FetchError: truncated, corrupt, too_large; unsupported, where the file has no such columns.
    """
    table = _Table(file)
    bound, nameless = MAX_RATIO * file.size + RATIO_SLACK, 0
    with DaemonThreadPool(_THREADS) as threads:
        for first in range(0, table.groups, _AHEAD):
            groups = range(first, min(first + _AHEAD, table.groups))
            for group, pieces in zip(groups, threads.map(table.small_pieces, groups), strict=True):
                try:
                    for row, path, name in table.names(group, pieces):
                        paths = list(row_paths(path, name, mark, row))
                        nameless += not paths
                        bound -= sum(map(len, paths)) + 64 * len(paths)
                        if bound < 0:
                            text = f"its names are over {MAX_RATIO} times its size; split the file"
                            raise FetchError("too_large", file.name, text)
                        for listed_path in paths:
                            yield listed_path, ArchiveMember(0, row, UNKNOWN, 0, 0, ROW)
                except _BROKEN as error:
                    text = f"the names of row group {group} cannot be read ({_line(error)})"
                    notes.append(f"{file.name}: {text}; its pictures are lost; fetch it again")
    if nameless:
        notes.append(f"{file.name}: {nameless} pictures have neither a path nor an id to be found by")


class ParquetImages:
    """The pictures of parquet files, by file and row; threads may share it.

    Of the two row groups of this process that were read last, the page that is being read and 32 MiB of the pictures
    before it are kept for neighbours.
    """

    def __init__(self, files: Sequence[RandomAccessFile], names: Sequence[str], limit: int) -> None:
        self._files, self._names, self._limit = files, names, limit
        self._lock = threading.Lock()  # on the next
        self._tables: OrderedDict[int, _Table] = OrderedDict()  # of the files that were read last

    def read(self, number: int, row: int, place: str) -> bytes | None:
        """The picture in a row of file ``number``; None where the row has none.

        Raises:
            FetchError: too_large, for a picture over ``limit`` bytes; corrupt; and what reading the file raises.
        """
        table = self._table(number)
        number_of_group, row = table.locate(row)
        key = self._names[number], number_of_group
        count = table.rows(number_of_group)
        group = _open_groups.get(key, lambda: _Group(lambda: table.pictures(number_of_group), count))
        try:
            picture = group.picture(row)
        except _BROKEN as error:
            raise FetchError("corrupt", place, f"{_DAMAGED} ({_line(error)})") from None
        if picture is not None and len(picture) > self._limit:
            text = f"{len(picture)} bytes, where {self._limit} are allowed (data.fetch_mb)"
            raise FetchError("too_large", place, text)
        return picture

    def _table(self, number: int) -> _Table:
        with self._lock:
            if number in self._tables:
                self._tables.move_to_end(number)
            else:
                self._tables[number] = _Table(self._files[number])
                if len(self._tables) > _TABLES:
                    self._tables.popitem(last=False)
            return self._tables[number]


# Files ----------------------------------------------------------------------------------------------------------------


class _Table:
    """The directory of a file, checked.

    Raises:
        FetchError: as :func:`list_parquet`.
    """

    def __init__(self, file: RandomAccessFile) -> None:
        self._file = file
        tail = file.read(max(file.size - _TAIL, 0), _TAIL)
        if file.size < 12 or not tail.endswith(MAGIC):
            raise FetchError("truncated", file.name, "the parquet file has no directory at its end; fetch it again")
        footer = int.from_bytes(tail[-8:-4], "little")
        if footer > file.size - 12:
            raise FetchError("corrupt", file.name, f"{_DAMAGED}: its directory is longer than the file")
        if footer > MAX_FOOTER:
            raise FetchError(
                "too_large", file.name, f"its directory has {footer} bytes, over {MAX_FOOTER}; split the file"
            )
        if footer + 8 > len(tail):
            tail = file.read(file.size - footer - 8, footer + 8)
        try:
            opened = self._open({file.size - len(tail): tail})
            self._metadata, self._wanted = opened.metadata, _columns(file, opened.schema_arrow)
            needed = {*self._wanted, "image.bytes"}
            rows, self._groups = read_footer(tail[-8 - footer : -8], needed)
            if any(group.chunks.keys() != needed for group in self._groups):
                raise ValueError("a row group lacks a column")
        except _BROKEN as error:
            raise FetchError("corrupt", file.name, f"{_DAMAGED} ({_line(error)})") from None
        self.groups = len(self._groups)
        self._starts = [0, *accumulate(group.rows for group in self._groups)]
        if self._starts[-1] != rows or self._metadata.num_row_groups != self.groups:
            raise FetchError("corrupt", file.name, f"{_DAMAGED}: its row groups have another number of rows than it")
        if rows > MAX_ROWS:
            raise FetchError("too_large", file.name, f"has {rows} rows, over {MAX_ROWS}; split the file")

    def locate(self, row: int) -> tuple[int, int]:
        """The row group of a row, and the row's place in it."""
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def rows(self, group: int) -> int:
        """Rows of a row group."""
        return self._groups[group].rows

    def small_pieces(self, group: int) -> dict[int, bytes]:
        """The columns of names of a row group, by their places; none where they are not small, or are nowhere."""
        pieces = {}
        for name in self._wanted:
            chunk = self._groups[group].chunks[name]
            if chunk.packed <= _SMALL and chunk.start + chunk.packed <= self._file.size:
                pieces[chunk.start] = self._file.read(chunk.start, chunk.packed)
        return pieces

    def names(self, group: int, pieces: dict[int, bytes]) -> Iterator[tuple[int, str | None, str | None]]:
        """Row, path and id of each picture of a row group."""
        row = self._starts[group]
        self._check_ratio(group, self._wanted)
        for batch in self._batches(group, self._wanted, _BATCH, pieces):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            there = columns["image"].is_valid().to_pylist() if "image" in columns else [True] * len(batch)
            paths = _texts(columns["image"].field("path")) if "image" in columns else [None] * len(batch)
            names = _texts(columns["id"]) if "id" in columns else [None] * len(batch)
            for number, (valid, path, name) in enumerate(zip(there, paths, names, strict=True), row):
                if valid:
                    yield number, path, name
            row += len(batch)
        if row != self._starts[group + 1]:
            raise ValueError(f"rows end at {row}, not {self._starts[group + 1]}")

    def pictures(self, group: int) -> Iterator[bytes | None]:
        """The pictures of a row group, row by row; None for a row without one."""
        self._check_ratio(group, ("image.bytes",))
        rows, (_, _, size) = self._groups[group].rows, self._groups[group].chunks["image.bytes"]
        many = min(max(rows * _PICTURES // max(size, 1), 1), _BATCH)
        for batch in self._batches(group, ("image.bytes",), many, {}):
            for value in batch.column(0):
                yield value["bytes"].as_py() if value.is_valid else None

    def _batches(
        self, group: int, columns: Sequence[str], rows: int, pieces: dict[int, bytes]
    ) -> Iterator[pa.RecordBatch]:
        opened = self._open(pieces, self._metadata)
        return opened.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)

    def _open(self, pieces: dict[int, bytes], metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        return pq.ParquetFile(
            _Handle(self._file, pieces),
            metadata=metadata,
            buffer_size=_BUFFER,
            pre_buffer=False,
            page_checksum_verification=True,
        )

    def _check_ratio(self, group: int, columns: Sequence[str]) -> None:
        for chunk in map(self._groups[group].chunks.get, columns):
            if chunk.size > MAX_RATIO * chunk.packed + RATIO_SLACK:
                text = f"row group {group} unpacks to {chunk.size} bytes, over {MAX_RATIO} times its size"
                raise FetchError("too_large", self._file.name, text)


def _columns(file: RandomAccessFile, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that names are in."""
    found = [field.name for field in schema]
    image = schema.field("image").type if found.count("image") == 1 else None
    inner = {} if image is None or not pa.types.is_struct(image) else {field.name: field.type for field in image}
    if "bytes" not in inner or not (pa.types.is_binary(inner["bytes"]) or pa.types.is_large_binary(inner["bytes"])):
        text = f"the parquet file has no column image of {{bytes, path}}; its columns are {', '.join(found)[:200]}"
        raise FetchError("unsupported", file.name, text)
    wanted = ["image.path"] if "path" in inner and _is_text(inner["path"]) else []
    wanted += ["id"] if found.count("id") == 1 and _is_text(schema.field("id").type) else []
    if not wanted:
        raise FetchError("unsupported", file.name, "the parquet file has neither image.path nor id to find pictures by")
    return tuple(wanted)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def _texts(column: pa.Array) -> list[str | None]:
    """Texts or integers as texts; bytes that are no UTF-8 are kept as paths keep them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    binary = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    return [None if text is None else text.decode("utf-8", "surrogateescape") for text in binary.to_pylist()]


class _Handle(RandomAccessStream):
    """A file for pyarrow; what lies in ``pieces`` (bytes by offset) is not read again."""

    def __init__(self, file: RandomAccessFile, pieces: dict[int, bytes]) -> None:
        super().__init__(file)
        self._pieces = pieces

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_PAGE:
            raise FetchError("too_large", self._file.name, f"{size} bytes are to be read at once, over {MAX_PAGE}")
        start = self._place
        for first, piece in self._pieces.items():
            if first <= start and start + size <= first + len(piece):
                data = piece[start - first : start - first + size]
                break
        else:
            data = self._file.read(start, size)
        self._place += len(data)
        return data


# Row groups -----------------------------------------------------------------------------------------------------------


class _Group:
    """A row group whose pictures are taken one by one; those that were passed last are kept."""

    def __init__(self, begin: Callable[[], Iterator[bytes | None]], rows: int) -> None:
        self._begin, self._rows = begin, rows
        self._left, self._next = iter(()), 0  # what is left, beginning with row _next
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def picture(self, row: int) -> bytes | None:
        with self._lock:
            if row in self._kept:
                return self._kept[row]
            if not self._next or row < self._next:
                self._left, self._next = self._begin(), 0
            try:
                for picture in islice(self._left, row + 1 - self._next):
                    self._keep(picture)
                    if self._next > row:
                        return picture
                raise ValueError(f"the row group ends before row {row}")
            except BaseException:
                self._next = 0  # to begin anew, if the server is there again
                raise

    def _keep(self, picture: bytes | None) -> None:
        if self._next in self._kept:
            self._size -= _weight(self._kept.pop(self._next))
        self._kept[self._next] = picture
        self._size += _weight(picture)
        while self._size > _RECENT:
            self._size -= _weight(self._kept.popitem(last=False)[1])
        self._next += 1
        if self._next == self._rows:
            self._left = iter(())  # lets go of the page


def _weight(picture: bytes | None) -> int:
    """Bytes that keeping a picture takes."""
    return 100 + len(picture or b"")


class _Groups:
    """The row groups of a process that were used last. There is one for all places, since their pages are what takes
    memory, and a build goes from place to place."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._groups: OrderedDict[tuple[str, int], _Group] = OrderedDict()

    def get(self, key: tuple[str, int], make: Callable[[], _Group]) -> _Group:
        with self._lock:
            self._groups[key] = group = self._groups.pop(key, None) or make()
            while len(self._groups) > self._most:
                self._groups.popitem(last=False)
            return group


_open_groups = _Groups(_OPEN)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
