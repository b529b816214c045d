"""Views of stored media: what one stage shows of each media item.

A view names the stored frames of a video that the model sees, or the tiles of an image, and the time message. It has no
pixels. :class:`MediaViews` makes views from the index alone, then decodes the pixels of a view on request.

The frames of a video are those that the manifest's sampler selects of the source. Its ``vlen``, ``fps`` and
``duration`` are in the index. Each selected frame is replaced by the nearest stored one. With the settings of the build
these are exactly the frames of the build. With others a frame is off by at most half the gap between stored frames, and
the time message names the frames that are really shown. With ``compat: published`` the frames are those of the build,
and the message counts what the published readers count (:mod:`framestream.pipeline.media.reference_sampling`).

Pixels are read frame by frame, by byte offset, and decoded straight into the caller's array. Frames stored at another
size, or with their aspect ratio, are stretched to S x S pixels by the filter of
:mod:`framestream.pipeline.media.resize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """What one stage shows of one media item, without its pixels."""

    row: int  #: row of the media table
    kind: str  #: image or video
    frame_indices: np.ndarray  #: int64 (F,), a video's stored frames in the order shown, with repeats; else empty
    message: str  #: time message of a video, else empty
    clips: int  #: number of clips of a video; 0 for an image
    tiles: int  #: number of tiles of an image; 0 for a video
    grid: Grid | None = None  #: (w, h) tiles after an image's overview; None for an image of one tile and for a video
    padded: bool = False  #: the image is padded to a square, because its dialogue has several
    root: int = 0  #: number of the shard root that has the media table

    @property
    def tokens(self) -> int:
        """Visual tokens of the media item in a row of the batch."""
        return self.clips * TOKENS_PER_CLIP + self.tiles * TOKENS_PER_TILE


class MediaViews:
    """Views of an index's media under one manifest, and their pixels. Many threads may use one object."""

    def __init__(self, index: Index, manifest: Manifest, entries: Sequence[MixEntryConfig] = (), root: int = 0) -> None:
        """Prepare views of the media of ``index``.

        Args:
            index: of one shard root.
            manifest: gives ``frames``, ``images``, ``seed`` and ``compat``.
            entries: entries of the mix; each may have its own bounds on the number of frames.
            root: number of the shard root, passed on to the views.
        """
        self.index, self.root = index, root
        self.frames, self.images, self.seed = manifest.frames, manifest.images, manifest.seed
        self._frames_by_entry = {entry.entry: entry.bound_frames(manifest.frames) for entry in entries}
        self._published = manifest.compat == "published"
        self._open_columns()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings and the index: see :meth:`Index.__reduce__`."""
        return {name: value for name, value in vars(self).items() if name not in ("_columns", "_reader")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_columns()

    def _open_columns(self) -> None:
        self._columns = {name: self.index.media[name] for name in self.index.media.column_names}
        self._reader = FrameReader(self.index)

    @property
    def frame_bounds(self) -> dict[str, list[int]]:
        """[min, max] frames by entry, for the entries whose bounds differ from the manifest's ``frames``."""
        different = {name: frames for name, frames in self._frames_by_entry.items() if frames != self.frames}
        return {name: [frames.min, frames.max] for name, frames in different.items()}

    def views(self, rows: list[int], entry: str = "") -> list[MediaView]:
        """Return the views of all media of one dialogue. Several images are padded and get one tile each.

        Args:
            rows: rows of the media table.
            entry: name of the dialogue's entry; bounds of that entry apply.

        Raises:
            ValueError: a video cannot be sampled under these settings.
        """
        several = sum(self._value("kind", row) == "image" for row in rows) > 1
        frames = self._frames_by_entry.get(entry, self.frames)
        return [
            self._image_view(row, several) if self._value("kind", row) == "image" else self._video_view(row, frames)
            for row in rows
        ]

    def _image_view(self, row: int, several: bool) -> MediaView:
        grid, count = None, 1
        if not several and self.images.mode != "square":
            size = self._value("width", row), self._value("height", row)
            grid = best_grid(*size, self.frames.size, self.images.max_grid)
            count = grid[0] * grid[1] + 1
        return MediaView(row, "image", np.empty(0, dtype=np.int64), "", 0, count, grid, several, self.root)

    def _video_view(self, row: int, frames: FramesConfig) -> MediaView:
        vlen, fps, duration = (self._value(name, row) for name in ("vlen", "fps", "duration"))
        if self._published:
            indices = row_values(self._columns["sample"], row).astype(np.int64)
            counted = row_values(self._columns["nominal"], row)
        else:
            rng = None
            if frames.sampler == "rand":
                rng = np.random.default_rng(media_seed(self.seed, self._value("key", row)))
            wanted = pad_to_clips(sample_indices(frames, vlen, fps, duration, rng), vlen, frames.clip_frames)
            stored = row_values(self._columns["frame_index"], row)
            indices = nearest_indices(stored, wanted)
            counted = stored[indices]
        message = time_message(frames.time_message, duration, counted, fps)
        return MediaView(row, "video", indices, message, len(indices) // frames.clip_frames, 0, root=self.root)

    def frame_times(self, view: MediaView) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Return the times of the frames of a video's view.

        Returns:
            the seconds of the time message, float64 (F,); those of the source, float64 (F,); the second of the
            source at which the video or clip begins; its duration in seconds
        """
        fps, start, duration = (float(self._value(name, view.row)) for name in ("fps", "start", "duration"))
        source = row_values(self._columns["timestamps"], view.row)[view.frame_indices]
        counted = row_values(self._columns["frame_index"], view.row)[view.frame_indices]
        if self._published:
            nominal = row_values(self._columns["nominal"], view.row)
            if len(nominal) != len(source):  # the published readers count other frames than they read
                return source - start, source, start, duration
            counted = nominal
        return counted / fps, source, start, duration

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        """Decode frames ``start`` .. ``start + n`` of a video's view into ``out``, uint8 (n, S, S, 3).

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are not a JPEG of the stated size.
        """
        self._reader.read_frames(view.row, view.frame_indices[start : start + len(out)].tolist(), out)

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        """Decode an image and split it into tiles in ``out``, uint8 (view.tiles, S, S, 3).

        Raises:
            OSError, ValueError: the shard cannot be read, or its bytes are not a JPEG of the stated size.
        """
        image = Image.fromarray(self._reader.read_image(view.row))
        out[:] = split_into_tiles(image, self.images.mode, out.shape[1], self.images.max_grid, view.padded)[0]

    def prefetch(self, view: MediaView, start: int, count: int) -> bool:
        """Request the bytes of an image, or of frames ``start`` .. ``start + count`` of a video's view, if it helps."""
        if not self.index.storage.remote:
            return False
        return self._reader.prefetch(view.row, view.frame_indices[start : start + count].tolist())

    def describe(self, view: MediaView) -> str:
        """Return shard and member of a media item, for messages."""
        return self._reader.describe(view.row)

    def _value(self, name: str, row: int) -> Any:
        return self._reader.column_value(name, row)


def nearest_indices(stored: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return, for each of ``wanted``, the index of the nearest number in ``stored``.

    Of two numbers at the same distance, the earlier is returned.

    Args:
        stored: int64 (n,), ascending.
        wanted: int64 (T,).

    Returns:
        int64 (T,).
    """
    if len(stored) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    after = np.searchsorted(stored, wanted).clip(1, len(stored) - 1)
    return np.where(wanted - stored[after - 1] <= stored[after] - wanted, after - 1, after).astype(np.int64)
