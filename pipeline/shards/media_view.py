"""Stored media as a stage sees them: which frames are shown, what is said about them, and their pixels.

The frames of a video are those the manifest's sampler takes of the source (its ``vlen``, ``fps`` and ``duration`` stand
in the index), each replaced by the nearest stored one. With the settings of the build these are exactly the frames of
the build; otherwise a frame is off by at most half the gap between stored frames, and the time message names the frames
that are really shown. With ``compat: published`` the frames are the build's and the message counts what the published
readers count (:mod:`framestream.pipeline.media.reference_sampling`). Pixels are read frame by frame, by byte offset, and decoded in place; frames
stored at another size, or with their aspect kept, are stretched to S x S by the filter of :mod:`framestream.pipeline.media.resize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from framestream.pipeline.config.data import MixEntryConfig
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.sampling import media_seed, pad_to_clips, sample_indices, time_message
from framestream.pipeline.media.tiling import Grid, best_grid, split_into_tiles
from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import Index, row_values


@dataclass(frozen=True, slots=True)
class MediaView:
    """What is shown of one medium."""

    row: int  #: of the media table
    kind: str  #: image or video
    frame_indices: np.ndarray  #: int64 (F,) stored frames of a video as they are shown, with repeats; empty for a still
    message: str  #: time message of a video, else empty
    clips: int  #: clips of a video
    tiles: int  #: tiles of a still
    grid: Grid | None = None  #: (w, h) tiles after a still's overview; None for a still of one tile and for a video
    padded: bool = False  #: the still is padded to a square, because its dialogue has several
    root: int = 0  #: number of the shard root whose media table ``row`` is of

    @property
    def tokens(self) -> int:
        """Visual tokens that stand for the medium in a row."""
        return self.clips * TOKENS_PER_CLIP + self.tiles * TOKENS_PER_TILE


class MediaViews:
    """Views and pixels of an index's media under one manifest; usable from many threads."""

    def __init__(self, index: Index, manifest: Manifest, entries: Sequence[MixEntryConfig] = (), root: int = 0) -> None:
        """Of the media of ``index``; ``entries`` may have bounds of frames of their own."""
        self.index, self.root = index, root
        self.frames, self.images, self.seed = manifest.frames, manifest.images, manifest.seed
        self._bounded = {entry.entry: entry.frames(manifest.frames) for entry in entries}
        self._published = manifest.compat == "published"
        self._column = {name: index.media[name] for name in index.media.column_names}
        self._pixels = FrameReader(index)

    @property
    def bounds(self) -> dict[str, list[int]]:
        """[min, max] frames of the entries that have other ones than the manifest's ``frames``."""
        kept = {name: frames for name, frames in self._bounded.items() if frames != self.frames}
        return {name: [frames.min, frames.max] for name, frames in kept.items()}

    def views(self, rows: list[int], entry: str = "") -> list[MediaView]:
        """Views of all media of one dialogue of ``entry``; several stills are padded and get one tile each.

        Raises:
            ValueError: a video cannot be sampled under these settings.
        """
        several = sum(self._value("kind", row) == "image" for row in rows) > 1
        frames = self._bounded.get(entry, self.frames)
        return [
            self._still(row, several) if self._value("kind", row) == "image" else self._video(row, frames)
            for row in rows
        ]

    def _still(self, row: int, several: bool) -> MediaView:
        grid, count = None, 1
        if not several and self.images.mode != "square":
            size = self._value("width", row), self._value("height", row)
            grid = best_grid(*size, self.frames.size, self.images.max_grid)
            count = grid[0] * grid[1] + 1
        return MediaView(row, "image", np.empty(0, dtype=np.int64), "", 0, count, grid, several, self.root)

    def _video(self, row: int, frames: FramesConfig) -> MediaView:
        vlen, fps, duration = (self._value(name, row) for name in ("vlen", "fps", "duration"))
        if self._published:
            places = row_values(self._column["sample"], row).astype(np.int64)
            counted = row_values(self._column["nominal"], row)
        else:
            rng = None
            if frames.sampler == "rand":
                rng = np.random.default_rng(media_seed(self.seed, self._value("key", row)))
            wanted = pad_to_clips(sample_indices(frames, vlen, fps, duration, rng), vlen, frames.clip_frames)
            stored = row_values(self._column["frame_index"], row)
            places = nearest_indices(stored, wanted)
            counted = stored[places]
        message = time_message(frames.time_message, duration, counted, fps)
        return MediaView(row, "video", places, message, len(places) // frames.clip_frames, 0, root=self.root)

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        """Decode the shown frames ``start`` .. ``start + len(out)`` of a video into ``out`` (n, S, S, 3) uint8.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        self._pixels.read_frames(view.row, view.frame_indices[start : start + len(out)].tolist(), out)

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        """Decode a still and cut it into ``out`` (view.tiles, S, S, 3) uint8.

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are no JPEG of the stated size.
        """
        picture = Image.fromarray(self._pixels.read_image(view.row))
        out[:] = split_into_tiles(picture, self.images.mode, out.shape[1], self.images.max_grid, view.padded)[0]

    def describe(self, view: MediaView) -> str:
        """Shard and member of a medium, for messages."""
        return self._pixels.describe(view.row)

    def _value(self, name: str, row: int):
        return self._pixels.column_value(name, row)


def nearest_indices(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each of ``wanted``, the place of the nearest number in ``stored`` (ascending); the earlier of two."""
    if len(stored) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    after = np.searchsorted(stored, wanted).clip(1, len(stored) - 1)
    return np.where(wanted - stored[after - 1] <= stored[after] - wanted, after - 1, after).astype(np.int64)
