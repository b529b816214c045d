"""Pixels of stored media, by byte offset: only the JPEGs that are asked for are read, each decoded in place."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np

from pipeline.index import Index, row_values
from pipeline.resize import resize
from pipeline.shard_format import decode_jpeg

OPEN_FILES = 128  #: shards a process keeps open


class Pixels:
    """Frames and stills of an index's media; usable from many threads."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._column = {name: index.media[name] for name in index.media.column_names}
        self._files = _Files(index)

    def read_frames(self, row: int, places: Sequence[int], out: np.ndarray) -> None:
        """Decode the stored frames ``places`` of video ``row`` into ``out`` (len(places), H, W, 3) uint8.

        Frames stored at another size are resized by the filter of :mod:`pipeline.resize`.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        offsets, sizes = (row_values(self._column[name], row) for name in ("frame_offset", "frame_size"))
        shard, width, height = (self.value(name, row) for name in ("shard", "width", "height"))
        file = self._files.open(shard)
        for k, place in enumerate(places):
            if k and place == places[k - 1]:
                out[k] = out[k - 1]
                continue
            decode_into(file.read(int(offsets[place]), int(sizes[place])), (height, width), out[k])

    def read_still(self, row: int) -> np.ndarray:
        """The picture of still ``row`` as stored, (H, W, 3) uint8.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        offset, size, shard = (self.value(name, row) for name in ("offset", "size", "shard"))
        pixels = decode_jpeg(self._files.open(shard).read(offset, size))
        stated = self.value("height", row), self.value("width", row)
        if pixels.shape[:2] != stated:
            raise ValueError(f"the still is {pixels.shape[:2]} (height, width), the index says {stated}")
        return pixels

    def where(self, row: int) -> str:
        """Shard and member of a medium, for messages."""
        extension = "jpg" if self.value("kind", row) == "image" else "mp4"
        return f"{self.index.path_of(self.value('shard', row))}: {self.value('key', row)}.{extension}"

    def value(self, name: str, row: int):
        """What the media table has in column ``name``."""
        return self._column[name][row].as_py()


def decode_into(jpeg: bytes, size: tuple[int, int], out: np.ndarray) -> None:
    """Decode a JPEG of ``size`` (height, width) into ``out`` (H, W, 3) uint8, resized where that is another size.

    Raises:
        ValueError: no JPEG of that size.
    """
    if size == out.shape[:2]:
        decode_jpeg(jpeg, out=out)
        return
    picture = decode_jpeg(jpeg)
    if picture.shape[:2] != size:
        raise ValueError(f"a JPEG is {picture.shape[:2]} (height, width), not {size} as stated")
    out[:] = resize(picture, out.shape[1], out.shape[0])


class _File:
    """A shard open for ranged reads; closed when its last user lets go of it."""

    def __init__(self, path: os.PathLike) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise ValueError(f"the shard ends within the {size} bytes at {offset}; build it again")
            data += more
        return data


class _Files:
    """The last shards used, kept open; a shard pushed out is closed after its readers are done."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._open: dict[int, _File] = {}
        self._lock = threading.Lock()

    def open(self, shard: int) -> _File:
        with self._lock:
            file = self._open.pop(shard, None)
        file = file or _File(self._index.path_of(shard))  # without the lock: a file system may hang here
        with self._lock:
            self._open[shard] = file
            if len(self._open) > OPEN_FILES:
                del self._open[next(iter(self._open))]
            return file
