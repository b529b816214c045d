"""Read frames and images of stored media by byte offset.

Only the JPEGs that are requested are read, and each is decoded straight into the caller's array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from framestream.pipeline.media.jpeg import decode_jpeg
from framestream.pipeline.media.resize import resize
from framestream.pipeline.shards.index import FRAME_DIGEST, Index, row_values
from framestream.pipeline.storage import ShardRef
from framestream.pipeline.utils.digests import frame_digest


class FrameReader:
    """Reads stored frames and images by row of the media table, as they are stored and without sampling.

    Which frames a stage shows is decided one level up, by :class:`framestream.pipeline.shards.media_view.MediaViews`.
    Many threads may use one reader.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._columns = {name: index.media[name] for name in index.media.column_names}
        self._shards: dict[int, ShardRef] = {}  # by row of the shard table; at most a few thousand

    def read_frames(self, row: int, indices: Sequence[int], out: np.ndarray) -> None:
        """Decode stored frames of a video into ``out``.

        Frames stored at another size are resized by the filter of :mod:`framestream.pipeline.media.resize`.

        Args:
            row: row of the video in the media table.
            indices: T indices into the stored frames, ascending, possibly with repeats.
            out: uint8 (T, H, W, 3).

        Raises:
            OSError, ValueError: the shard cannot be read, a frame is damaged, or is not a JPEG of the stated size.
        """
        width, height = (self.column_value(name, row) for name in ("width", "height"))
        digests = self._digests(row)
        first, shard, ranges = self._frame_ranges(row, indices)
        for k, jpeg in zip(first, self.index.storage.read(shard, ranges), strict=True):
            if digests is not None:
                check_frame(jpeg, int(digests[indices[k]]), f"stored frame {indices[k]}")
            decode_into(jpeg, (height, width), out[k])
        for k, index in enumerate(indices):
            if k and index == indices[k - 1]:
                out[k] = out[k - 1]

    def read_image(self, row: int) -> np.ndarray:
        """Return the pixels of image ``row`` as stored, uint8 (H, W, 3).

        Raises:
            OSError, ValueError: the shard cannot be read, or the image is damaged or of another size.
        """
        [jpeg] = self.index.storage.read(*self._image_range(row))
        digests = self._digests(row)
        if digests is not None:
            check_frame(jpeg, int(digests[0]), "the stored image")
        pixels = decode_jpeg(jpeg)
        stated = self.column_value("height", row), self.column_value("width", row)
        if pixels.shape[:2] != stated:
            raise ValueError(f"the stored image is {pixels.shape[:2]} (height, width), but the index says {stated}")
        return pixels

    def prefetch(self, row: int, indices: Sequence[int]) -> bool:
        """Request what :meth:`read_frames`, or :meth:`read_image` without ``indices``, will read soon.

        Returns:
            Whether it was requested; False if nothing is gained, or enough is under way.
        """
        wanted = self._frame_ranges(row, indices)[1:] if indices else self._image_range(row)
        return self.index.storage.prefetch(*wanted)

    def describe(self, row: int) -> str:
        """Return shard and member of a media item, for messages."""
        extension = "jpg" if self.column_value("kind", row) == "image" else "mp4"
        return f"{self.index.shard_path(self.column_value('shard', row))}: {self.column_value('key', row)}.{extension}"

    def column_value(self, name: str, row: int) -> Any:
        """Return the value of column ``name`` of the media table in ``row``."""
        return self._columns[name][row].as_py()

    def _frame_ranges(self, row: int, indices: Sequence[int]) -> tuple[list[int], ShardRef, list[tuple[int, int]]]:
        """Return the positions in ``indices`` to read, without repeats of the one before, their shard and ranges."""
        offsets, sizes = (row_values(self._columns[name], row) for name in ("frame_offset", "frame_size"))
        # a repeated index is read and decoded once, then copied
        first = [k for k, index in enumerate(indices) if not k or index != indices[k - 1]]
        ranges = [(int(offsets[indices[k]]), int(sizes[indices[k]])) for k in first]
        return first, self._shard(self.column_value("shard", row)), ranges

    def _image_range(self, row: int) -> tuple[ShardRef, list[tuple[int, int]]]:
        offset, size, shard = (self.column_value(name, row) for name in ("offset", "size", "shard"))
        return self._shard(shard), [(offset, size)]

    def _digests(self, row: int) -> np.ndarray | None:
        """Return the digests of the frames of a media item, uint32 (frames,); None if they were never recorded."""
        column = self._columns.get(FRAME_DIGEST)
        values = None if column is None else column[row].values
        return None if values is None else values.to_numpy(zero_copy_only=True)

    def _shard(self, row: int) -> ShardRef:
        shard = self._shards.get(row)
        if shard is None:
            shard = self._shards[row] = self.index.shard(row)
        return shard


def check_frame(jpeg: bytes | memoryview, digest: int, name: str) -> None:
    """Compare the bytes of a stored frame with its digest in the index; ``name`` is the frame for messages.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    if frame_digest(jpeg) != digest:
        raise ValueError(f"{name} is damaged (its digest is not the one in the index); restore the shard")


def decode_into(jpeg: bytes | memoryview, size: tuple[int, int], out: np.ndarray) -> None:
    """Decode a JPEG into ``out``, resized if its size differs from that of ``out``.

    Args:
        jpeg: bytes of the JPEG.
        size: (height, width) that the JPEG must have.
        out: uint8 (H, W, 3).

    Raises:
        ValueError: the bytes are not a JPEG of that size.
    """
    if size == out.shape[:2]:
        decode_jpeg(jpeg, out=out)
        return
    frame = decode_jpeg(jpeg)
    if frame.shape[:2] != size:
        raise ValueError(f"a stored JPEG is {frame.shape[:2]} (height, width), but {size} is stated")
    out[:] = resize(frame, out.shape[1], out.shape[0])
