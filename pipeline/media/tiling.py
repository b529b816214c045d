"""Stills to tiles: the anyres grid, its tiles and the overview.

``anyres_nopad`` picks, among the grids of 1 x 1 to ``max_grid`` x ``max_grid`` tiles, the one that keeps most pixels
of the picture (its fitted area, at most its own), then the one that wastes least; the first wins, widths in the outer
loop. The picture is stretched to the grid, cut row by row, and an overview of one tile stands before the tiles, also
before a grid of one. ``square`` stretches to one tile. Several stills in one dialogue are each padded to a square with
their mean colour and take one tile. Resizing is PIL's bicubic, as published.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image

Grid = tuple[int, int]


@lru_cache(maxsize=8)
def grids(max_grid: int) -> tuple[Grid, ...]:
    """All (w, h) grids up to ``max_grid`` tiles a side, widths in the outer loop."""
    return tuple((w, h) for w in range(1, max_grid + 1) for h in range(1, max_grid + 1))


def best_grid(
    width: int, height: int, size: int, max_grid: int, max_tiles: int | None = None, among: Iterable[Grid] = ()
) -> Grid:
    """The (w, h) grid of tiles of ``size`` pixels for a picture of ``width`` x ``height`` pixels.

    Args:
        max_tiles: if given, only grids whose tiles and overview are at most that many (1 x 1 always may be taken).
        among: the grids to choose from, in order; all up to ``max_grid`` if empty.
    """
    chosen, most, least = (1, 1), 0, 0
    for w, h in tuple(among) or grids(max_grid):
        if max_tiles is not None and (w, h) != (1, 1) and w * h + 1 > max_tiles:
            continue
        scale = min(w * size / width, h * size / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = w * h * size * size - kept
        if kept > most or (kept == most and waste < least):
            chosen, most, least = (w, h), kept, waste
    return chosen


def split_into_tiles(
    picture: Image.Image, mode: str, size: int, max_grid: int, several: bool = False
) -> tuple[np.ndarray, Grid | None]:
    """Tiles of a picture: uint8 (n, size, size, 3) with the overview first, and the (w, h) grid of the tiles after it.

    The grid is None where the picture is one tile (``square``, or ``several`` stills in the dialogue).
    """
    picture = picture.convert("RGB")
    if several:
        return _stretched(pad_square(picture), size, size)[None], None
    if mode == "square":
        return _stretched(picture, size, size)[None], None
    w, h = best_grid(*picture.size, size, max_grid)
    done = np.empty((w * h + 1, size, size, 3), dtype=np.uint8)
    done[0] = _stretched(picture, size, size)
    cut = _stretched(picture, w * size, h * size).reshape(h, size, w, size, 3)
    done[1:].reshape(h, w, size, size, 3)[:] = cut.swapaxes(1, 2)
    return done, (w, h)


def pad_square(picture: Image.Image) -> Image.Image:
    """The RGB picture in the middle of a square of the published mean colour."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    padded = Image.new("RGB", (side, side), MEAN_COLOUR)
    padded.paste(picture, ((side - width) // 2, (side - height) // 2))
    return padded


#: floor(255 x ImageNet mean), what ``pad_square`` fills with
MEAN_COLOUR = (123, 116, 103)


def _stretched(picture: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


@lru_cache(maxsize=256)
def raster_order(grid: Grid, side: int = 8) -> np.ndarray:
    """Order of a tiled still's tokens: int64 (side**2 * (w*h + 1),) places in the tile-by-tile token sequence.

    The overview's tokens come first; then the tiles, as blocks of ``side`` x ``side`` tokens, are read row by row
    across the whole picture.
    """
    w, h = grid
    each = side * side
    blocks = np.arange(each, each * (w * h + 1)).reshape(h, w, side, side).swapaxes(1, 2).reshape(-1)
    order = np.concatenate([np.arange(each), blocks])
    order.setflags(write=False)
    return order
