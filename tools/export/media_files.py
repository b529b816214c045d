"""Stored media as files that any trainer reads: the MP4 or JPEG of the shard, clips on a clock that begins at 0."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

from tqdm import tqdm

from framestream.pipeline.media.mjpeg_mp4 import mux_mjpeg
from framestream.pipeline.shards.frame_reader import check_frame
from framestream.pipeline.shards.index import FRAME_DIGEST, Index, ShardsError, row_values
from framestream.pipeline.shards.writer import MAX_MEMBER
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.tools.common.text_table import format_bytes
from framestream.tools.export.folder import DatasetExportError

EXTENSIONS = {"video": "mp4", "image": "jpg"}  #: by kind of the media item
_KEY = re.compile("[a-z][0-9a-f]{24}")
_SHARD = re.compile(r"(?:video|image)/[a-z]+-[0-9]+\.tar")


class MediaExport:
    """Writes media items of an index into a folder. Many threads may use one object."""

    def __init__(self, index: Index, folder: Path) -> None:
        self._index, self._folder = index, folder
        self._columns = {name: index.media[name] for name in index.media.column_names}

    def path(self, row: int) -> tuple[str, str]:
        """Return the kind of a media item, and the path of its file relative to the folder.

        Raises:
            ShardsError: the index is not in the format, so that the path could leave the folder.
        """
        key, kind = (self._columns[name][row].as_py() for name in ("key", "kind"))
        if kind not in EXTENSIONS or not _KEY.fullmatch(key):
            raise ShardsError(f"{self._index.root}: media.arrow: row {row} has no valid key or kind; build it again")
        return kind, f"{kind}s/{key[1:3]}/{key}.{EXTENSIONS[kind]}"

    def write(self, rows: Sequence[int], workers: int) -> dict[int, str]:
        """Write the files of media items that are not there yet, each completely or not at all.

        Args:
            rows: of the media table.
            workers: threads.

        Returns:
            Row -> message for media that are damaged.

        Raises:
            DatasetExportError: there is too little space, or a file there is another one.
            OSError: the shards cannot be reached, or a file cannot be written.
        """
        missing = [row for row in rows if not self._is_written(row)]
        sizes = {row: self._columns["size"][row].as_py() for row in missing}
        free = shutil.disk_usage(self._folder).free
        if sum(sizes.values()) > free:
            needed = format_bytes(sum(sizes.values()))
            raise DatasetExportError(f"{self._folder}: needs {needed}, and {format_bytes(free)} are free; make room")
        for parent in sorted({(self._folder / self.path(row)[1]).parent for row in missing}):
            parent.mkdir(parents=True, exist_ok=True)
        failures: dict[int, str] = {}
        total = sum(sizes.values())
        bar = tqdm(total=total, unit="B", unit_scale=True, desc="media", disable=None)
        with bar, DaemonThreadPool(workers) as pool:
            for count, (row, failure) in enumerate(self._written(pool, missing, 2 * workers), 1):
                if failure:
                    failures[row] = failure
                bar.update(sizes[row])
                if elapsed := bar.format_dict["elapsed"]:
                    bar.set_postfix_str(f"{count:,} of {len(missing):,}, {count / elapsed:.0f} files/s", refresh=False)
        return failures

    def _written(self, pool: DaemonThreadPool, rows: Sequence[int], ahead: int) -> Iterator[tuple[int, str]]:
        """Write files in the threads of ``pool``, and yield row and failure in order."""
        waiting: deque[tuple[int, Future[str]]] = deque()
        remaining = iter(rows)
        while True:
            waiting += [
                (row, pool.submit(self._write, row)) for row in itertools.islice(remaining, ahead - len(waiting))
            ]
            if not waiting:
                return
            row, future = waiting.popleft()
            try:
                failure = future.result()
            except Exception:  # the folder is free for another export once nothing is written there any more
                wait([other for _, other in waiting if not other.cancel()])
                raise
            yield row, failure

    def _write(self, row: int) -> str:
        """Write one file. Returns why it cannot be used, or nothing."""
        try:
            data = self.read(row)
        except ValueError as error:
            return " ".join(str(error).split())
        write_atomic(self._folder / self.path(row)[1], data)
        return ""

    def _is_written(self, row: int) -> bool:
        target = self._folder / self.path(row)[1]
        try:
            found = target.stat().st_size
        except FileNotFoundError:
            return False
        size = self._columns["size"][row].as_py()
        # a clip has the same JPEGs and other times: its header has about as many bytes
        slack = 64 + 8 * len(self._columns["timestamps"][row]) if self._is_clip(row) else 0
        if abs(found - size) > slack:
            raise DatasetExportError(f"{target}: has {found:,} bytes in place of {size:,}; remove it and repeat")
        return True

    def _is_clip(self, row: int) -> bool:
        return self._columns["kind"][row].as_py() == "video" and self._columns["start"][row].as_py() != 0

    def read(self, row: int) -> bytes:
        """Return the file of a media item: the bytes of the shard, or a clip whose times count from its beginning.

        Raises:
            OSError: the shard cannot be reached.
            ValueError: it is damaged.
        """
        shard = self._index.shard(self._columns["shard"][row].as_py())
        offset, size, digest = (self._columns[name][row].as_py() for name in ("offset", "size", "sha256"))
        if not _SHARD.fullmatch(shard.name) or not 0 < size <= MAX_MEMBER or not 0 <= offset <= shard.size - size:
            raise ValueError("the index names no valid bytes; build the shards again")
        [part] = self._index.storage.read(shard, [(offset, size)])
        data = bytes(part)
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("damaged (its sha256 is not the one in the index); restore the shard")
        if self._is_clip(row):
            return self._from_zero(row, self._frames(row, data, offset))
        return data

    def _frames(self, row: int, data: bytes, offset: int) -> list[bytes]:
        """Return the JPEGs of a member that begins at ``offset``, compared with their digests."""
        starts, sizes = (row_values(self._columns[name], row) for name in ("frame_offset", "frame_size"))
        frames = [
            data[start - offset : start - offset + size]
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
            if 0 < size <= offset + len(data) - start and start >= offset
        ]
        if len(frames) != len(starts):
            raise ValueError("the index names frames outside of the item; build the shards again")
        column = self._columns.get(FRAME_DIGEST)
        for number, digest in enumerate(() if column is None else column[row].as_py() or ()):
            check_frame(frames[number], digest, f"stored frame {number}")
        return frames

    def _from_zero(self, row: int, frames: Sequence[bytes]) -> bytes:
        start, duration, width, height = (
            self._columns[name][row].as_py() for name in ("start", "duration", "width", "height")
        )
        seconds = (row_values(self._columns["timestamps"], row) - start).clip(0)
        return mux_mjpeg(frames, seconds, duration, width, height)
