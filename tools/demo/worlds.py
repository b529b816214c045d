"""Small worlds of the demo: shapes with known color, position, number and order, planned and drawn from a seed.

A ``World`` describes one clip completely: which shape of which color is visible when and where, and the answers
(``facts``). ``plan`` makes the worlds of a split, with all answers equally frequent. ``draw`` renders the frames.
Files and questions are elsewhere (``tools/demo_data.py``, ``tools/demo/dialogues.py``).
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

SIDE = 128  #: width and height of frames, in pixels

COLORS = {
    "red": (222, 32, 36),
    "green": (36, 176, 64),
    "blue": (40, 72, 230),
    "yellow": (245, 222, 40),
    "purple": (156, 44, 200),
    "cyan": (40, 210, 224),
    "orange": (246, 136, 24),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIDES = ("left", "right")
NUMBERS = ("one", "two", "three", "four")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

QUARTERS = ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74))  #: their centers
SHORT = 4.0  #: seconds of most clips: four frames at one a second, which are one clip of the vision tower

#: Worlds of each kind by split. Held-out counts are multiples of 8 colors, 4 shapes, 2 sides, or 56 pairs of colors.
SIZES = {
    "train": {
        "scene": 6000,
        "count": 4300,
        "motion": 1400,
        "order": 900,
        "needle": 480,
        "long": 2,
    },
    "heldout": {"scene": 112, "count": 112, "motion": 112, "order": 112, "needle": 112},
    "haystack": {"empty": 2},
}

#: Seconds of the training videos with a needle, and their share.
NEEDLE_SECONDS = {32: 0.22, 48: 0.22, 64: 0.23, 128: 0.2, 256: 0.08, 512: 0.05}


Path: TypeAlias = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Appearance:
    """One shape, visible from ``start`` to ``end`` seconds, moving evenly along ``path``. Unit: frame width."""

    color: str
    shape: str
    diameter: float
    path: Path  #: center at the start and at the end
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class World:
    """One clip: its name (unique over the splits), duration, frame rate, and everything visible in it."""

    name: str
    kind: str
    seconds: float
    fps: int
    appearances: tuple[Appearance, ...]
    facts: dict[str, str] = field(default_factory=dict)
    noise: bool = True

    @property
    def frames(self) -> int:
        """Number of frames."""
        return round(self.seconds * self.fps)


def balanced(values: Sequence, count: int, rng: np.random.Generator) -> list:
    """Return ``count`` values in random order, each equally often, or once more if ``count`` is not a multiple."""
    values = [values[i] for i in rng.permutation(len(values))]
    return [values[i % len(values)] for i in rng.permutation(count)]


def plan(split: str, seed: int, share: float = 1.0) -> list[World]:
    """Return the worlds of a split of :data:`SIZES`. With ``share`` < 1 there are fewer of each kind, at least one."""
    makers = {
        "scene": _scene,
        "order": _order,
        "count": _count,
        "motion": _motion,
        "needle": _needle,
        "long": _long,
    }
    makers |= {"empty": _empty}
    worlds = []
    for kind, size in SIZES[split].items():
        rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{kind}".encode())])
        count = max(1, round(size * share))
        worlds += makers[kind](split, count, rng)
    return worlds


def draw(world: World, seed: int) -> Iterator[np.ndarray]:
    """Yield the frames of a world in time order, (SIDE, SIDE, 3) uint8 each. One array may be yielded several times."""
    rng = np.random.default_rng([seed, zlib.crc32(world.name.encode())])
    ground = background(rng)
    grain = 3 * rng.standard_normal((4, SIDE, SIDE, 1), dtype=np.float32) if world.noise else np.zeros((1, 1, 1, 1))
    masks = [mask(a.shape, a.diameter * SIDE) for a in world.appearances]
    last_state: list | None = None
    frame = np.empty((0, 0, 3), np.uint8)
    for number in range(world.frames):
        time = number / world.fps
        state = [_center_at(a, time) for a in world.appearances]
        if world.noise or state != last_state:
            canvas = ground.copy()
            for appearance, shape_mask, center in zip(world.appearances, masks, state, strict=True):
                if center is not None:
                    paste(canvas, shape_mask, center, COLORS[appearance.color])
            canvas += grain[number % len(grain)]
            frame = canvas.clip(0, 255).astype(np.uint8)
        last_state = state
        yield frame


def background(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Return a dull texture of a random tint, (height, width, 3) float32: soft blotches and fine grain."""
    blotches = rng.normal(0, 1, (int(rng.integers(3, 9)), int(rng.integers(3, 9))))
    soft = _interpolate(_interpolate(blotches, height).T, width).T
    grain = rng.uniform(1, 6) * rng.standard_normal((height, width), dtype=np.float32)
    level = rng.uniform(50, 110) + rng.uniform(4, 16) * soft + grain
    tint = 1 + rng.uniform(-0.08, 0.08, 3)
    return (level[..., None] * tint).astype(np.float32)


def _interpolate(rows: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` rows at equal distances from the first to the last of ``rows``, linearly between neighbors."""
    position = np.linspace(0, len(rows) - 1, count)
    before = np.minimum(position.astype(int), len(rows) - 2)
    share = (position - before)[:, None]
    return rows[before] * (1 - share) + rows[before + 1] * share


def mask(shape: str, diameter: float) -> np.ndarray:
    """Return the coverage of a shape, (D, D) float32 in 0..1, with soft edges. All shapes cover similar areas."""
    side = int(np.ceil(diameter)) + 2
    axis = (np.arange(side) - (side - 1) / 2) / (diameter / 2)
    x, y = np.meshgrid(axis, axis)
    if shape == "circle":
        inside = 1 - np.hypot(x, y)
    elif shape == "square":
        inside = 0.86 - np.maximum(abs(x), abs(y))
    elif shape == "triangle":
        inside = np.minimum(0.85 - y, (y + 0.95) * 0.5 - abs(x))
    elif shape == "cross":
        bar, thickness = 0.98, 0.34
        inside = np.maximum(np.minimum(bar - abs(x), thickness - abs(y)), np.minimum(thickness - abs(x), bar - abs(y)))
    else:
        raise ValueError(f"{shape!r} is not one of {', '.join(SHAPES)}")
    return (inside * (diameter / 2) + 0.5).clip(0, 1).astype(np.float32)


def paste(canvas: np.ndarray, shape_mask: np.ndarray, center: tuple[float, float], color: tuple) -> None:
    """Paint a shape into ``canvas``, (H, W, 3) float32, in place. ``center`` is (x, y) as fractions of the frame."""
    height, width = canvas.shape[:2]
    half = shape_mask.shape[0] // 2
    left, top = round(center[0] * width) - half, round(center[1] * height) - half
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + shape_mask.shape[1], width), min(top + shape_mask.shape[0], height)
    if x0 >= x1 or y0 >= y1:
        return
    part = shape_mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
    region = canvas[y0:y1, x0:x1]
    region += part * (np.asarray(color, np.float32) - region)


def _center_at(appearance: Appearance, time: float) -> tuple[float, float] | None:
    """Return the center of a shape at ``time`` seconds; None while it is not visible."""
    if not appearance.start <= time < appearance.end:
        return None
    done = (time - appearance.start) / (appearance.end - appearance.start)
    (x0, y0), (x1, y1) = appearance.path
    return x0 + (x1 - x0) * done, y0 + (y1 - y0) * done


def _drift(center: tuple[float, float], rng: np.random.Generator, reach: float = 0.05) -> Path:
    """Return a short path around ``center``."""
    (dx, dy) = rng.uniform(-reach, reach, 2)
    return (center[0] - dx, center[1] - dy), (center[0] + dx, center[1] + dy)


def _scene(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Make worlds with one large shape on one side. Facts: color, shape, side."""
    worlds = []
    rows = zip(
        balanced(list(COLORS), count, rng), balanced(SHAPES, count, rng), balanced(SIDES, count, rng), strict=True
    )
    for i, (color, shape, side) in enumerate(rows):
        center = (0.27 if side == "left" else 0.73, rng.uniform(0.32, 0.68))
        path = _drift(center, rng, 0.03)
        shown = Appearance(color, shape, rng.uniform(0.42, 0.52), path, 0.0, SHORT)
        facts = {"colour": color, "shape": shape, "side": side}
        worlds.append(World(f"{split}-scene-{i:04d}", "scene", SHORT, 1, (shown,), facts))
    return worlds


def _order(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Make worlds of 16 seconds with two colors, in the first and last quarter: at least 8 frames apart at 1 fps."""
    pairs = balanced(list(itertools.permutations(COLORS, 2)), count, rng)
    return [
        _two_colors(f"{split}-order-{i:04d}", "order", pair, 16.0, (rng.uniform(2.6, 4), rng.uniform(12, 13.4)), 1, rng)
        for i, pair in enumerate(pairs)
    ]


def _long(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Like ``_order``, over more than ten minutes of a static scene, so that all 512 frames are sampled."""
    colors = balanced(list(COLORS), 2 * count, rng)
    pairs = zip(colors[::2], colors[1::2], strict=True)
    return [
        _two_colors(
            f"{split}-long-{i:04d}", "long", pair, 640.0, (rng.uniform(160, 220), rng.uniform(420, 480)), 1, rng
        )
        for i, pair in enumerate(pairs)
    ]


def _two_colors(
    name: str, kind: str, pair: tuple, seconds: float, cut: tuple[float, float], fps: int, rng: np.random.Generator
) -> World:
    static = kind == "long"
    shown = []
    for color, (start, end) in zip(pair, ((0.0, cut[0]), (cut[1], seconds)), strict=True):
        path = _drift((rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.62)), rng, 0.0 if static else 0.05)
        shown.append(Appearance(color, str(rng.choice(SHAPES)), rng.uniform(0.48, 0.62), path, start, end))
    facts = {"first colour": pair[0], "last colour": pair[1]}
    return World(name, kind, seconds, fps, tuple(shown), facts, noise=not static)


def _count(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Make worlds with one to four equal shapes, each in its own quarter of the frame."""
    worlds = []
    rows = zip(
        balanced(NUMBERS, count, rng), balanced(list(COLORS), count, rng), balanced(SHAPES, count, rng), strict=True
    )
    for i, (number, color, shape) in enumerate(rows):
        chosen = rng.permutation(4)[: NUMBERS.index(number) + 1]
        diameter = rng.uniform(0.34, 0.40)
        shown = tuple(
            Appearance(color, shape, diameter, _drift(QUARTERS[quarter], rng, 0.04), 0.0, SHORT)
            for quarter in sorted(chosen)
        )
        facts = {"count": number, "colour": color, "shape": shape}
        worlds.append(World(f"{split}-count-{i:04d}", "count", SHORT, 1, shown, facts))
    return worlds


def _motion(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Make worlds with one shape that crosses the frame in four seconds."""
    worlds = []
    rows = zip(balanced(list(DIRECTIONS), count, rng), balanced(list(COLORS), count, rng), strict=True)
    for i, (direction, color) in enumerate(rows):
        dx, dy = DIRECTIONS[direction]
        across = rng.uniform(0.4, 0.6)
        middle = (across if dx == 0 else 0.5, across if dy == 0 else 0.5)
        path = ((middle[0] - 0.34 * dx, middle[1] - 0.34 * dy), (middle[0] + 0.34 * dx, middle[1] + 0.34 * dy))
        shown = Appearance(color, str(rng.choice(SHAPES)), rng.uniform(0.34, 0.42), path, 0.0, SHORT)
        facts = {"direction": direction, "colour": color, "shape": shown.shape}
        worlds.append(World(f"{split}-motion-{i:04d}", "motion", SHORT, 1, (shown,), facts))
    return worlds


def _needle(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Make empty scenes with a colored flash in one frame, 32 to 64 seconds, in training up to 512.

    The depths of the flash are spread evenly, for each duration.
    """
    worlds = []
    lengths = [seconds for seconds, share in NEEDLE_SECONDS.items() for _ in range(round(100 * share))]
    if split == "heldout":
        lengths = [seconds for seconds in NEEDLE_SECONDS if seconds <= 64]
    colors, durations = balanced(list(COLORS), count, rng), balanced(lengths, count, rng)
    depths = {seconds: _spread(durations.count(seconds), rng) for seconds in sorted(set(durations))}
    for i, (color, seconds) in enumerate(zip(colors, durations, strict=True)):
        start = float(int(next(depths[seconds]) * seconds))
        flash = Appearance(color, "circle", rng.uniform(0.8, 0.95), ((0.5, 0.5), (0.5, 0.5)), start, start + 1)
        name = f"{split}-needle-{i:04d}"
        worlds.append(World(name, "needle", float(seconds), 1, (flash,), {"needle": color}, noise=False))
    return worlds


def _spread(count: int, rng: np.random.Generator) -> Iterator[float]:
    """Return ``count`` numbers from 0 to 1 in random order: one from each of as many equal parts of that range."""
    return iter(((rng.permutation(count) + rng.random(count)) / count).tolist())


def _empty(split: str, count: int, rng: np.random.Generator) -> list[World]:
    """Make empty scenes of more than ten minutes, in which images are hidden."""
    return [World(f"{split}-empty-{i:04d}", "empty", 640.0, 1, (), noise=False) for i in range(count)]
