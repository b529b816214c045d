"""Grids and tiles against the golden tables and images; token order against a slow construction."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.decode import VideoRequest, decode_video
from framestream.pipeline.media.tiling import best_grid, grids, pad_square, raster_order, split_into_tiles
from tests.helpers.golden_data import GOLDEN, files, json_file, present

table = json_file("anyres/grids.json") or {}
pictures = (json_file("anyres/pictures.json") or {}) if present("anyres/sources.npz") else {}


@pytest.mark.parametrize("rows", [rows for rows in [table.get("table")] if rows])
def test_golden_grids(rows):
    assert pinpoints(table["pinpoints"], 1) == list(grids(6))
    for row in rows:
        (width, height), size = row["size_w_h"], row["tile"]
        grid = best_grid(width, height, size, 6)
        assert list(grid) == row["grid_w_h"], row
        assert [side * size for side in grid] == row["best_w_h"]
        count = grid[0] * grid[1] + 1
        assert count == row["tiles_with_overview"] and count * 64 == row["tokens"]
        for name, best in row.items():
            if limit := re.fullmatch(r"best_w_h_under_(\d+)_tiles_of_pixels", name):
                limited = best_grid(width, height, size, 6, max_tiles=int(limit[1]))
                assert [side * size for side in limited] == best, (name, row)


def pinpoints(text: str, size: int) -> list[tuple[int, int]]:
    if text.startswith("["):
        return [(w // size, h // size) for w, h in json.loads(text)]
    (w0, h0), (w1, h1) = ((int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", text))
    return list(itertools.product(range(w0, w1 + 1), range(h0, h1 + 1)))


@pytest.mark.parametrize("rows", [rows for rows in [table.get("other_pinpoints")] if rows])
def test_golden_grids_among_others(rows):
    for row in rows:
        among = pinpoints(row["pinpoints"], row["tile"])
        assert list(best_grid(*row["size_w_h"], row["tile"], 6, among=among)) == row["grid_w_h"], row


@pytest.mark.parametrize("row", [pytest.param(row, id=str(row["tile"])) for row in table.get("unsupported_tiles", [])])
def test_golden_unsupported_tiles(row):
    """There, tiles are of a few sizes and others fail; here all sizes have the same grids."""
    assert row["error"]
    got, grid = split_into_tiles(Image.new("RGB", (3 * row["tile"], row["tile"])), "anyres_nopad", row["tile"], 6)
    assert grid == (3, 1) and got.shape == (4, row["tile"], row["tile"], 3)


def load_image(name: str) -> Image.Image:
    return Image.fromarray(np.load(GOLDEN / "anyres" / "sources.npz")[name])


def cut(name: str, how: str, size: int) -> np.ndarray:
    mode = "square" if how == "square" else "anyres_nopad"
    return split_into_tiles(load_image(name), mode, size, 6, several=how == "pad")[0]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=f"{row['picture']}-{row['how']}-{row['tile']}") for row in pictures.get("pictures", [])],
)
def test_golden_tiles(row):
    source = load_image(row["picture"])
    assert (source.mode, [*source.size]) == (row["mode"], row["size_w_h"])
    compare(cut(row["picture"], row["how"], row["tile"]), row)


def compare(got: np.ndarray, row: dict) -> None:
    n, channels, height, width = row["shape"]
    assert got.shape == (n, height, width, channels) and got.dtype == np.uint8
    pixels = (got / 255 - np.array(pictures["image_mean"])) / np.array(pictures["image_std"])
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), row["tile_mean"], atol=2e-3)
    np.testing.assert_allclose(pixels.std(axis=(1, 2)), row["tile_std"], atol=2e-3)
    t, c, y, x = np.array(row["sample_positions"]).T
    np.testing.assert_allclose(pixels[t, y, x, c], row["sample_values"], atol=0.018)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row['video']}-{row['tile']}") for row in pictures.get("videos", [])]
)
def test_golden_frames(tmp_path, row):
    """The frames of a folder, decoded and resized as the builder does it."""
    frames = np.load(GOLDEN / "anyres" / "sources.npz")[row["video"]]
    assert [*frames.shape[:3]] == row["frames_h_w"]
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number:05d}.png")
    every = -(-len(frames) // 4) * 4
    settings = FramesConfig(sampler="middle", min=every, max=every, size=row["tile"])
    compare(decode_video(tmp_path, VideoRequest("img", settings)).frames, row)


@pytest.mark.parametrize(
    "path", files("anyres/pixels_after_resize.npz") if present("anyres/sources.npz") else [], ids=lambda path: path.stem
)
def test_golden_pixels(path):
    for name, expected in np.load(path).items():
        source, _, how = name.partition("_")
        got = cut(source, how, expected.shape[-2]).reshape(expected.shape)
        assert np.abs(got.astype(int) - expected).max() <= 1, name


@given(st.integers(1, 5), st.integers(1, 5))
def test_raster_order_reads_the_picture_row_by_row(w, h):
    # Token (tile, y, x) has its position in the full image as value; in raster order these must ascend.
    places = [-1] * 64 + [
        (ty * 8 + y) * w * 8 + tx * 8 + x for ty in range(h) for tx in range(w) for y in range(8) for x in range(8)
    ]
    order = raster_order((w, h))
    assert np.array(places)[order[64:]].tolist() == list(range(64 * w * h))
    assert order[:64].tolist() == list(range(64))


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 6))
def test_number_of_tiles_is_what_is_cut(width, height, max_grid):
    image = Image.new("L", (width, height), 90)
    for mode, several in itertools.product(("square", "anyres_nopad"), (False, True)):
        cut, grid = split_into_tiles(image, mode, 16, max_grid, several)
        assert cut.shape == (1 if grid is None else grid[0] * grid[1] + 1, 16, 16, 3)
        assert grid == (None if several or mode == "square" else best_grid(width, height, 16, max_grid))
        assert grid is None or grid in grids(max_grid)


def test_pad_square_centres_on_the_mean_colour():
    padded = np.asarray(pad_square(Image.new("RGB", (4, 2), (1, 2, 3))))
    assert padded.shape == (4, 4, 3)
    assert padded[0, 0].tolist() == padded[3, 3].tolist() == [int(255 * m) for m in (0.485, 0.456, 0.406)]
    assert (padded[1:3] == [1, 2, 3]).all()
