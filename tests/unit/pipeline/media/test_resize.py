"""Resizing against Pillow and against the filter written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.resize import MAX_ASPECT, resize, stored_size
from tests.helpers.media.footage import FOOTAGE, all_frames


def by_pillow(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).astype(int)


def keys(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5 (IEEE ASSP 29, 1981)."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(source: int, target: int) -> np.ndarray:
    """(target, source): what each pixel takes of the source; the filter is as wide as a target pixel when reducing."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale
    table = keys((np.arange(source) + 0.5 - centres[:, None]) / max(scale, 1.0))
    return table / table.sum(1, keepdims=True)


@pytest.mark.parametrize("name", ["bigbuckbunny.mp4", "bikes.mp4"])
@pytest.mark.parametrize("size", [(224, 224), (448, 448), (398, 224)])
def test_real_footage_is_resized_as_pillow_does(name: str, size: tuple[int, int]) -> None:
    frames, _ = all_frames(FOOTAGE / name)
    for frame in frames[:: len(frames) // 4]:
        off = np.abs(resize(frame, *size) - by_pillow(frame, *size))
        assert (off <= 1).mean() > 0.999 and (off == 0).mean() > 0.98


sides = st.integers(1, 300)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(16, 260), st.integers(16, 260), st.integers(0, 2**31))
def test_noise_of_any_size_is_resized_as_pillow_does(width: int, height: int, new: int, tall: int, seed: int) -> None:
    """Without black and white, which Pillow 12 and 13 clip between the two directions in different orders."""
    noise = np.random.default_rng(seed).integers(64, 192, (height, width, 3), dtype=np.uint8)
    off = np.abs(resize(noise, new, tall) - by_pillow(noise, new, tall))
    assert (off <= 1).mean() >= 0.99


@pytest.mark.parametrize("size", [(720, 1280), (1280, 720), (3, 5), (300, 40), (40, 300), (500, 500), (224, 100)])
def test_the_wildest_noise_is_resized_as_pillow_does(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    off = np.abs(resize(noise, 224, 224) - by_pillow(noise, 224, 224))
    assert (off <= 1).mean() >= 0.99


def test_the_filter_is_the_bicubic_one() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    for width, height in ((64, 64), (300, 200), (16, 128)):
        exact = np.einsum("yh,hwc,xw->yxc", weights(90, height), noise, weights(160, width), optimize=True).clip(0, 255)
        off = np.abs(resize(noise, width, height) - exact)
        assert (off <= 1.5).mean() > 0.98 and off.mean() < 0.5  # rounded twice, clipped between the two directions


def test_images_of_the_size_are_untouched_and_rotated_ones_read() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize(noise, 30, 20), noise)
    turned = noise.transpose(1, 0, 2)[::-1]
    turned.flags.writeable = False
    np.testing.assert_array_equal(resize(turned, 16, 16), resize(turned.copy(), 16, 16))


@given(st.sampled_from(["short_side", "long_side"]), st.integers(8, 300), st.integers(1, 5000), st.integers(1, 5000))
def test_kept_aspects_are_even_and_as_close_as_even_gets(mode: str, half: int, width: int, height: int) -> None:
    size = 2 * half
    try:
        found = stored_size(mode, size, width, height)
    except ValueError:
        assert mode == "short_side" and max(width, height) > (MAX_ASPECT - 1) * min(width, height)
        return
    fixed = min if mode == "short_side" else max
    assert fixed(found) == size and all(side % 2 == 0 and side >= 2 for side in found)
    for side, source in zip(found, (width, height), strict=True):
        assert side == 2 or abs(side - source * size / fixed(width, height)) <= 1
    assert stored_size("stretch", size, width, height) == (size, size)


def test_an_odd_size_cannot_keep_the_aspect() -> None:
    with pytest.raises(ManifestError, match="size: 225 is odd; short_side needs an even one"):
        FramesConfig(sampler="middle", min=4, max=4, size=225, resize="short_side")
