"""Stored media as a stage sees them: which frames are shown, what is said about them, and their pixels.

The frames of a video are those the manifest's sampler takes of the source (its ``vlen``, ``fps`` and ``duration`` stand
in the index), each replaced by the nearest stored one. With the settings of the build these are exactly the frames of
the build; otherwise a frame is off by at most half the gap between stored frames, and the time message names the frames
that are really shown. With ``compat: published`` the frames are the build's and the message counts what the published
readers count (:mod:`pipeline.published`). Pixels are read frame by frame, by byte offset, and decoded in place; frames
stored at another size, or with their aspect kept, are stretched to S x S by the filter of :mod:`pipeline.resize`.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.images import Grid, best_grid, tiles
from pipeline.index import Index, row_values
from pipeline.manifest import TOKENS_PER_CLIP, TOKENS_PER_TILE, Manifest
from pipeline.resize import resize
from pipeline.sampling import fit_to_clips, media_seed, sample_indices, time_message
from pipeline.shard_format import decode_jpeg

OPEN_FILES = 128  #: shards a process keeps open


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of one medium."""

    row: int  #: of the media table
    kind: str  #: image or video
    places: np.ndarray  #: int64 (F,) stored frames of a video as they are shown, with repeats; empty for a still
    message: str  #: time message of a video, else empty
    clips: int  #: clips of a video
    tiles: int  #: tiles of a still
    grid: Grid | None = None  #: (w, h) tiles after a still's overview; None for a still of one tile and for a video
    padded: bool = False  #: the still is padded to a square, because its dialogue has several

    @property
    def tokens(self) -> int:
        """Visual tokens that stand for the medium in a row."""
        return self.clips * TOKENS_PER_CLIP + self.tiles * TOKENS_PER_TILE


class Visuals:
    """Views and pixels of an index's media under one manifest; usable from many threads."""

    def __init__(self, index: Index, manifest: Manifest) -> None:
        self.index = index
        self.frames, self.images, self.seed = manifest.frames, manifest.images, manifest.seed
        self._published = manifest.compat == "published"
        self._column = {name: index.media[name] for name in index.media.column_names}
        self._files = _Files(index)

    def views(self, rows: list[int]) -> list[View]:
        """Views of all media of one dialogue; several stills are padded and get one tile each.

        Raises:
            ValueError: a video cannot be sampled under these settings.
        """
        several = sum(self._value("kind", row) == "image" for row in rows) > 1
        return [self._still(row, several) if self._value("kind", row) == "image" else self._video(row) for row in rows]

    def _still(self, row: int, several: bool) -> View:
        grid, count = None, 1
        if not several and self.images.mode != "square":
            size = self._value("width", row), self._value("height", row)
            grid = best_grid(*size, self.frames.size, self.images.max_grid)
            count = grid[0] * grid[1] + 1
        return View(row, "image", np.empty(0, dtype=np.int64), "", 0, count, grid, several)

    def _video(self, row: int) -> View:
        vlen, fps, duration = (self._value(name, row) for name in ("vlen", "fps", "duration"))
        if self._published:
            places = row_values(self._column["sample"], row).astype(np.int64)
            counted = row_values(self._column["nominal"], row)
        else:
            rng = None
            if self.frames.sampler == "rand":
                rng = np.random.default_rng(media_seed(self.seed, self._value("key", row)))
            wanted = fit_to_clips(sample_indices(self.frames, vlen, fps, duration, rng), vlen, self.frames.clip_frames)
            stored = row_values(self._column["frame_index"], row)
            places = nearest(stored, wanted)
            counted = stored[places]
        message = time_message(self.frames.time_message, duration, counted, fps)
        return View(row, "video", places, message, len(places) // self.frames.clip_frames, 0)

    def read_frames(self, view: View, start: int, out: np.ndarray) -> None:
        """Decode the shown frames ``start`` .. ``start + len(out)`` of a video into ``out`` (n, S, S, 3) uint8.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        offsets, sizes = (row_values(self._column[name], view.row) for name in ("frame_offset", "frame_size"))
        shard, width, height = (self._value(name, view.row) for name in ("shard", "width", "height"))
        places = view.places[start : start + len(out)].tolist()
        file = self._files.open(shard)
        for k, place in enumerate(places):
            if k and place == places[k - 1]:
                out[k] = out[k - 1]
                continue
            data = file.read(int(offsets[place]), int(sizes[place]))
            if (height, width) == out.shape[1:3]:
                decode_jpeg(data, out=out[k])
            else:
                out[k] = resize(decode_jpeg(data), out.shape[2], out.shape[1])

    def read_still(self, view: View, out: np.ndarray) -> None:
        """Decode a still and cut it into ``out`` (view.tiles, S, S, 3) uint8.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        offset, size, shard = (self._value(name, view.row) for name in ("offset", "size", "shard"))
        pixels = decode_jpeg(self._files.open(shard).read(offset, size))
        stated = self._value("height", view.row), self._value("width", view.row)
        if pixels.shape[:2] != stated:
            raise ValueError(f"the still is {pixels.shape[:2]} (height, width), the index says {stated}")
        picture = Image.fromarray(pixels)
        out[:] = tiles(picture, self.images.mode, out.shape[1], self.images.max_grid, view.padded)[0]

    def where(self, row: int) -> str:
        """Shard and member of a medium, for messages."""
        extension = "jpg" if self._value("kind", row) == "image" else "mp4"
        return f"{self.index.path_of(self._value('shard', row))}: {self._value('key', row)}.{extension}"

    def _value(self, name: str, row: int):
        return self._column[name][row].as_py()


def nearest(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of ``wanted``, the place of the nearest number in ``stored`` (ascending); the earlier of two."""
    if len(stored) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    after = np.searchsorted(stored, wanted).clip(1, len(stored) - 1)
    return np.where(wanted - stored[after - 1] <= stored[after] - wanted, after - 1, after).astype(np.int64)


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
            file = self._open.pop(shard, None) or _File(self._index.path_of(shard))
            self._open[shard] = file
            if len(self._open) > OPEN_FILES:
                del self._open[next(iter(self._open))]
            return file
