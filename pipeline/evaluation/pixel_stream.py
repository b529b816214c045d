"""Decode the pixels of media views a few clips at a time, so that a long video is never in memory as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.shards.media_view import MediaView

CHUNK_CLIPS = 16  #: clips that are decoded at a time

#: clips, uint8 (n, T, S, S, 3), and image tiles, uint8 (m, S, S, 3)
Pixels: TypeAlias = tuple[torch.Tensor, torch.Tensor]
#: from the pixels of a prompt, all clips before all tiles, to its merged tokens, (clips + tiles, 64, C)
Encode: TypeAlias = Callable[[Iterable[Pixels]], torch.Tensor]


class PixelReader(Protocol):
    """Decodes the pixels of media views: :class:`MediaViews` of one root, or the ``MediaReader`` of several."""

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        """See :meth:`MediaViews.read_frames`."""

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        """See :meth:`MediaViews.read_image`."""


def stream_pixels(
    reader: PixelReader, views: Sequence[MediaView], config: FramesConfig, shuffle: np.random.Generator | None = None
) -> Iterator[Pixels]:
    """Yield the clips of all videos in the order of ``views``, then the tiles of all images.

    Args:
        shuffle: draws a random order for the frames of each video.

    Raises:
        OSError, ValueError: media cannot be read or decoded.
    """
    side = config.size
    no_pixels = torch.empty(0, config.clip_frames, side, side, 3, dtype=torch.uint8)
    frames_per_chunk = CHUNK_CLIPS * config.clip_frames
    for view in views:
        if view.kind != "video":
            continue
        count = len(view.frame_indices)
        order = np.arange(count) if shuffle is None else shuffle.permutation(count)
        for start in range(0, count, frames_per_chunk):
            frames = _read_frames(reader, view, order[start : start + frames_per_chunk], side)
            yield torch.from_numpy(frames).unflatten(0, (-1, config.clip_frames)), no_pixels[:, 0]
    for view in views:
        if view.kind != "video":
            tiles = np.empty((view.tiles, side, side, 3), dtype=np.uint8)
            reader.read_image(view, tiles)
            yield no_pixels, torch.from_numpy(tiles)


def read_pixels(
    reader: PixelReader, views: Sequence[MediaView], config: FramesConfig, shuffle: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decode clips, uint8 (N_c, T, S, S, 3), and image tiles, uint8 (N_s, S, S, 3), in the order of ``views``.

    ``shuffle`` draws a random order for the frames of each video.
    """
    side = config.size
    clips = np.empty((sum(view.clips for view in views), config.clip_frames, side, side, 3), dtype=np.uint8)
    tiles = np.empty((sum(view.tiles for view in views), side, side, 3), dtype=np.uint8)
    clip = tile = 0
    for some_clips, some_tiles in stream_pixels(reader, views, config, shuffle):
        clips[clip : clip + len(some_clips)], tiles[tile : tile + len(some_tiles)] = some_clips, some_tiles
        clip, tile = clip + len(some_clips), tile + len(some_tiles)
    return clips, tiles


def read_some_images(
    reader: PixelReader, views: Sequence[MediaView], config: FramesConfig, most: int
) -> list[np.ndarray]:
    """Decode at most ``most`` of the images that ``views`` show, evenly spread: uint8 (S, S, 3) each.

    The frames of all videos come first, then the tiles of all images: those of :func:`even_positions`.
    """
    side = config.size
    ordered = sorted(views, key=lambda view: view.kind != "video")
    ends = np.cumsum([0, *(len(view.frame_indices) + view.tiles for view in ordered)])
    positions = even_positions(int(ends[-1]), most)
    images: list[np.ndarray] = []
    for view, first, end in zip(ordered, ends[:-1], ends[1:], strict=True):
        wanted = positions[(positions >= first) & (positions < end)] - first
        if not len(wanted):
            continue
        if view.kind == "video":
            images += list(_read_frames(reader, view, wanted, side))
        else:
            tiles = np.empty((view.tiles, side, side, 3), dtype=np.uint8)
            reader.read_image(view, tiles)
            images += list(tiles[wanted])
    return images


def even_positions(total: int, most: int) -> np.ndarray:
    """Return at most ``most`` evenly spread numbers below ``total``, int64 (n,), with the first and the last."""
    return np.linspace(0, total - 1, min(total, most)).round().astype(np.int64)


def _read_frames(reader: PixelReader, view: MediaView, positions: np.ndarray, side: int) -> np.ndarray:
    """Decode the frames at ``positions`` of a video's view, int64 (n,) in any order: uint8 (n, S, S, 3)."""
    ascending = np.argsort(positions, kind="stable")
    frames = np.empty((len(positions), side, side, 3), dtype=np.uint8)
    reader.read_frames(dataclasses.replace(view, frame_indices=view.frame_indices[positions[ascending]]), 0, frames)
    return frames[np.argsort(ascending)]
