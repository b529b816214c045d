"""Split images into tiles: the anyres grid, its tiles and the overview.

``anyres_nopad`` selects a grid of 1 x 1 to ``max_grid`` x ``max_grid`` tiles. It takes the grid that preserves most
pixels of the image (the area that fits into it, at most the image's own), and among these the one that wastes least. Of
equal grids the first is taken, with widths in the outer loop. The image is stretched to the grid and split row by row.
An overview of one tile precedes the tiles, also for a grid of one tile. ``square`` stretches to one tile. If a dialogue
has several images, each is padded to a square with the mean color and becomes one tile. Resizing is PIL's bicubic, as
published.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image

Grid = tuple[int, int]

#: floor(255 x ImageNet mean), with which ``pad_square`` fills
MEAN_COLOR = (123, 116, 103)


@lru_cache(maxsize=8)
def grids(max_grid: int) -> tuple[Grid, ...]:
    """Return all (w, h) grids up to ``max_grid`` tiles per side, widths in the outer loop."""
    return tuple((w, h) for w in range(1, max_grid + 1) for h in range(1, max_grid + 1))


def best_grid(
    width: int, height: int, size: int, max_grid: int, max_tiles: int | None = None, among: Iterable[Grid] = ()
) -> Grid:
    """Return the (w, h) grid of tiles of ``size`` pixels for an image of ``width`` x ``height`` pixels.

    Args:
        max_tiles: limit on the number of tiles with the overview; 1 x 1 is always allowed.
        among: the grids to select from, in order; all up to ``max_grid`` if empty.
    """
    best, most_used, least_waste = (1, 1), 0, 0
    for w, h in tuple(among) or grids(max_grid):
        if max_tiles is not None and (w, h) != (1, 1) and w * h + 1 > max_tiles:
            continue
        scale = min(w * size / width, h * size / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        waste = w * h * size * size - used
        if used > most_used or (used == most_used and waste < least_waste):
            best, most_used, least_waste = (w, h), used, waste
    return best


def split_into_tiles(
    image: Image.Image, mode: str, size: int, max_grid: int, several: bool = False
) -> tuple[np.ndarray, Grid | None]:
    """Split an image into tiles, uint8 (n, size, size, 3), and return them with the (w, h) grid.

    The overview is the first tile and not part of the grid. The grid is None if the image is one tile (``square``, or
    ``several`` images in the dialogue).
    """
    image = image.convert("RGB")
    if several:
        return _stretch(pad_square(image), size, size)[None], None
    if mode == "square":
        return _stretch(image, size, size)[None], None
    w, h = best_grid(*image.size, size, max_grid)
    tiles = np.empty((w * h + 1, size, size, 3), dtype=np.uint8)
    tiles[0] = _stretch(image, size, size)
    stretched = _stretch(image, w * size, h * size).reshape(h, size, w, size, 3)
    tiles[1:].reshape(h, w, size, size, 3)[:] = stretched.swapaxes(1, 2)
    return tiles, (w, h)


def pad_square(image: Image.Image) -> Image.Image:
    """Center an RGB image in a square of the published mean color."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    padded = Image.new("RGB", (side, side), MEAN_COLOR)
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded


def _stretch(image: Image.Image, width: int, height: int) -> np.ndarray:
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@lru_cache(maxsize=256)
def raster_order(grid: Grid, side: int = 8) -> np.ndarray:
    """Return the order of a tiled image's tokens: int64 (side**2 * (w*h + 1),) indices into the tile-by-tile tokens.

    The overview's tokens come first. Then the tiles, blocks of ``side`` x ``side`` tokens, are read row by row across
    the full image.
    """
    w, h = grid
    per_tile = side * side
    blocks = np.arange(per_tile, per_tile * (w * h + 1)).reshape(h, w, side, side).swapaxes(1, 2).reshape(-1)
    order = np.concatenate([np.arange(per_tile), blocks])
    order.setflags(write=False)
    return order
