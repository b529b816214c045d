"""Arrow files in a build's work folder: written in batches of rows, read through memory maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.atomic_io import atomic_file, fsync

BATCH_ROWS = 4096  #: rows of a record batch


class TableWriter:
    """Write rows to an Arrow IPC file, in record batches of :data:`BATCH_ROWS`. :meth:`close` must be called."""

    def __init__(self, schema: pa.Schema, path: Path) -> None:
        self._schema = schema
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._writer = pa.ipc.new_file(self._file, schema)
        self._pending: list[dict[str, Any]] = []
        self.rows = 0  #: rows added so far

    def add(self, row: dict[str, Any]) -> None:
        """Add one row, given by column name."""
        self.rows += 1
        self._pending.append(row)
        if len(self._pending) == BATCH_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the remaining rows and the file's footer, and sync the file to disk."""
        self._flush()
        self._writer.close()
        fsync(self._file.fileno(), self._file.name)
        self._file.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, self._schema))
            self._pending = []


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file atomically."""
    with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=BATCH_ROWS):
            writer.write_batch(batch)


def map_table(path: Path, digest: str | None = None, checked: bool = False) -> pa.Table:
    """Open an Arrow IPC file as a table over a memory map.

    The arguments and errors are those of :class:`framestream.pipeline.utils.arrow_mmap.MappedTable`.
    """
    return MappedTable(path, digest, checked).table
