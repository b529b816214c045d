"""Pixels of stored media, by byte offset: only the JPEGs that are asked for are read, each decoded in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from framestream.pipeline.media.jpeg import decode_jpeg
from framestream.pipeline.media.resize import resize
from framestream.pipeline.shards.index import Index, row_values
from framestream.pipeline.storage import ShardRef


class FrameReader:
    """Frames and stills of an index's media; usable from many threads."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._column = {name: index.media[name] for name in index.media.column_names}
        self._shards: dict[int, ShardRef] = {}  # a few thousand at most

    def read_frames(self, row: int, places: Sequence[int], out: np.ndarray) -> None:
        """Decode the stored frames ``places`` of video ``row`` into ``out`` (len(places), H, W, 3) uint8.

        Frames stored at another size are resized by the filter of :mod:`framestream.pipeline.media.resize`.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        offsets, sizes = (row_values(self._column[name], row) for name in ("frame_offset", "frame_size"))
        shard, width, height = (self.column_value(name, row) for name in ("shard", "width", "height"))
        first = [k for k, place in enumerate(places) if not k or place != places[k - 1]]
        ranges = [(int(offsets[places[k]]), int(sizes[places[k]])) for k in first]
        for k, jpeg in zip(first, self.index.storage.read(self._shard(shard), ranges), strict=True):
            decode_into(jpeg, (height, width), out[k])
        for k, place in enumerate(places):
            if k and place == places[k - 1]:
                out[k] = out[k - 1]

    def read_image(self, row: int) -> np.ndarray:
        """The picture of still ``row`` as stored, (H, W, 3) uint8.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        offset, size, shard = (self.column_value(name, row) for name in ("offset", "size", "shard"))
        [jpeg] = self.index.storage.read(self._shard(shard), [(offset, size)])
        pixels = decode_jpeg(jpeg)
        stated = self.column_value("height", row), self.column_value("width", row)
        if pixels.shape[:2] != stated:
            raise ValueError(f"the still is {pixels.shape[:2]} (height, width), the index says {stated}")
        return pixels

    def describe(self, row: int) -> str:
        """Shard and member of a medium, for messages."""
        extension = "jpg" if self.column_value("kind", row) == "image" else "mp4"
        return f"{self.index.path_of(self.column_value('shard', row))}: {self.column_value('key', row)}.{extension}"

    def column_value(self, name: str, row: int):
        """What the media table has in column ``name``."""
        return self._column[name][row].as_py()

    def _shard(self, row: int) -> ShardRef:
        shard = self._shards.get(row)
        if shard is None:
            shard = self._shards[row] = self.index.shard(row)
        return shard


def decode_into(jpeg: bytes | memoryview, size: tuple[int, int], out: np.ndarray) -> None:
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
