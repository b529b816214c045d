"""Select the frames of a video by a sampler, and write the message that tells the model their times.

The rules are those of the published recipe (arXiv 2501.00574 and its training code), checked number by number against
golden tables. The video has ``vlen`` frames at ``fps`` frames per second and lasts ``duration`` seconds. The bounds are
``low`` and ``high``, and the vision tower takes clips of ``clip`` frames.

* ``middle``: N = high, or low (vlen at most) if that is more. [0, vlen) is divided into n = min(N, vlen) intervals with
  truncated edges. The floor of each interval's middle is selected, and the last frame is repeated up to N.
* ``dynamic_fps1``: N = clip * floor(duration / clip), at least ``clip``, then at most ``high``, then at least ``low``
  (clip * floor(vlen / clip) for a video with fewer than ``low`` frames); then as ``middle``.
* ``fpsX``: times 1/(2X), 3/(2X), 5/(2X) ... seconds; time * fps is rounded half to even. At most ``high`` frames are
  selected, without padding.
* ``rand``: N as for ``middle``, with one random frame of each interval.
"""

from __future__ import annotations

import hashlib

import numpy as np

from framestream.pipeline.config.preprocessing import FramesConfig


def sample_indices(
    frames: FramesConfig, vlen: int, fps: float, duration: float, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return source frame numbers in [0, vlen), int64 (N,), in time order and with repeats.

    Raises:
        ValueError: the video has no frames, ``dynamic_fps1`` gives a count that is not a multiple of ``clip_frames``,
            or ``rand`` has no ``rng``.
    """
    indices = frame_indices(frames.sampler, vlen, fps, duration, frames.min, frames.max, frames.clip_frames, rng)
    if frames.sampler == "dynamic_fps1":
        check_count(len(indices), frames.clip_frames)
    return indices


def frame_indices(
    sampler: str,
    vlen: int,
    fps: float,
    duration: float,
    low: int,
    high: int,
    clip: int,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Apply the rules above to plain numbers: int64 (N,); ``fpsX`` may select no frames."""
    if vlen < 1:
        raise ValueError(f"a video of {vlen} frames cannot be sampled")
    if sampler in ("middle", "rand"):
        count = max(min(low, vlen), high)
    elif sampler == "dynamic_fps1":
        count = fps1_count(duration, vlen, low, high, clip)
    elif not sampler.startswith("fps"):
        raise ValueError(f"frames.sampler {sampler!r} has no rule; add it to frame_indices")
    else:
        return _at_rate(float(sampler[3:]), vlen, fps, duration, high)
    edges = np.linspace(0, vlen, min(count, vlen) + 1).astype(np.int64)
    if sampler != "rand":
        indices = (edges[:-1] + edges[1:] - 1) // 2
    elif rng is None:
        raise ValueError("frames.sampler rand requires a random generator; pass rng")
    else:
        indices = rng.integers(edges[:-1], edges[1:])
    return _repeat_last(indices, count)


def fps1_count(duration: float, frames: float, low: int, high: int, clip: int) -> int:
    """Return how many frames ``dynamic_fps1`` selects of ``frames`` frames that last ``duration`` seconds."""
    if frames < low:
        low = int(frames // clip) * clip
    return max(min(int(duration // clip) * clip or clip, high), low)


def _at_rate(rate: float, vlen: int, fps: float, duration: float, high: int) -> np.ndarray:
    gap = 1 / rate
    times = np.arange(gap / 2, duration + gap / 2, gap)
    indices = np.around(times * fps).astype(np.int64)
    return indices[indices < vlen][:high]


def _repeat_last(indices: np.ndarray, count: int) -> np.ndarray:
    return np.pad(indices, (0, count - len(indices)), mode="edge") if len(indices) < count else indices


def check_count(count: int, clip_frames: int) -> None:
    """Raise ValueError if ``count`` is not a multiple of ``clip_frames``."""
    if count % clip_frames:
        raise ValueError(f"{count} frames are not a multiple of {clip_frames} (frames.clip_frames); change frames.max")


def pad_to_clips(indices: np.ndarray, vlen: int, clip_frames: int) -> np.ndarray:
    """Repeat the last index up to a multiple of ``clip_frames``; use the middle frame if ``indices`` is empty.

    ``middle`` and ``dynamic_fps1`` are unchanged. ``fpsX`` may end within a clip, or select nothing of a short video.
    """
    if not len(indices):
        indices = np.array([(vlen - 1) // 2], dtype=np.int64)
    return _repeat_last(indices, -(-len(indices) // clip_frames) * clip_frames)


def media_seed(seed: int, key: str) -> int:
    """Return the seed of the ``rand`` sampler for one media item: builds and inference select the same frames."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")


def time_message(style: str, duration: float, indices: np.ndarray, fps: float) -> str:
    """Return the text after every image placeholder of a video: it starts with a newline and ends with a space.

    Args:
        style: ``short`` (count only), ``long`` (the second of every frame, one decimal) or ``none`` (empty text).
        duration: of the video or its clip, in seconds.
        indices: frame numbers, repeats included; they count from the start of the clip.
    """
    if style == "none":
        return ""
    head = f"\nThe video lasts for {duration:.2f} seconds, and {len(indices)} frames are uniformly sampled"
    if style == "short":
        return f"{head} from it. "
    seconds = np.around(np.asarray(indices) / fps, 1).tolist()  # numpy's rounding, as published: 0.05 gives 0.0
    return f"{head} at {', '.join(map(str, seconds))} seconds. "
