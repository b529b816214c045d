"""Write frames as JPEGs into an MP4 with the times of their source, and locate them in it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

TIME_SCALE = 90_000  #: ticks per second of the MP4 clock

COARSE_TIME_SCALE = 1_000  #: ticks per second if two frames lie so far apart (over 6 hours) that 90 kHz ticks overflow


def frame_ticks(seconds: np.ndarray, end: float) -> tuple[np.ndarray, int]:
    """Return presentation times int64 (T,) of frames at ``seconds`` (T,) up to ``end``, and the ticks per second.

    Times are rounded to the nearest tick. If two frames would share a tick, the later one gets the next tick.
    """
    gaps = np.diff(seconds, append=max(end, seconds[-1]))
    scale = TIME_SCALE if gaps.max() * TIME_SCALE < 2**31 - TIME_SCALE else COARSE_TIME_SCALE
    # tick minus index never decreases, so ticks increase by at least one per frame
    index = np.arange(len(seconds))
    return np.maximum.accumulate(np.rint(seconds * scale).astype(np.int64) - index) + index, scale


def mux_mjpeg(jpegs: Sequence[bytes], timestamps: np.ndarray, end: float, width: int, height: int) -> bytes:
    """Put JPEGs of one size into an MP4 whose presentation times are the source's.

    Args:
        jpegs: T complete JPEGs.
        timestamps: float64 (T,), seconds in the source, ascending, not negative; equal ones are one tick apart.
        end: second at which the last frame stops being shown.
        width: of every JPEG, in pixels.
        height: of every JPEG, in pixels.

    Returns:
        The MP4. Frame times are exact to 1/90000 s (to 1 ms if frames lie more than 6 hours apart). An edit list
        preserves the time of a first frame later than 0.

    Raises:
        ValueError: there are no frames, counts differ, or times are not finite, ascending and at least 0.
    """
    seconds = np.asarray(timestamps, dtype=np.float64)
    if len(jpegs) == 0 or seconds.shape != (len(jpegs),):
        raise ValueError(f"{len(jpegs)} frames with timestamps of shape {seconds.shape}; give one timestamp per frame")
    if not (np.isfinite(seconds).all() and np.isfinite(end) and seconds[0] >= 0 and (np.diff(seconds) >= 0).all()):
        raise ValueError("timestamps must be finite, ascending and at least 0")
    ticks, scale = frame_ticks(seconds, end)
    durations = np.diff(ticks, append=max(round(end * scale), int(ticks[-1]) + 1))

    buffer = io.BytesIO()
    options = {"fflags": "+bitexact", "movie_timescale": str(scale), "video_track_timescale": str(scale)}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        base = Fraction(1, scale)
        stream = container.add_mux_stream("mjpeg", width=width, height=height, time_base=base)
        for jpeg, tick, duration in zip(jpegs, ticks.tolist(), durations.tolist(), strict=True):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base, packet.is_keyframe = stream, base, True
            packet.pts, packet.dts, packet.duration = tick, tick, duration
            container.mux(packet)
    return buffer.getvalue()


def mjpeg_frames(mp4: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Locate the JPEGs of an MP4: offsets int64 (T,), sizes int32 (T,), timestamps float64 (T,) in seconds.

    Raises:
        ValueError: the bytes are not an MP4 with one MJPEG stream.
    """
    try:
        with av.open(io.BytesIO(mp4)) as container:
            if len(container.streams) != 1:
                raise ValueError(f"expected one track, found {len(container.streams)}")
            stream = container.streams.video[0]
            if stream.codec_context.name != "mjpeg":
                raise ValueError(f"expected MJPEG frames, found {stream.codec_context.name}")
            entries = [(entry.pos, entry.size, entry.timestamp) for entry in stream.index_entries]
            base = stream.time_base
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not an MP4 of JPEG frames ({error})") from None
    offsets, sizes, ticks = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    return offsets.copy(), sizes.astype(np.int32), ticks * base.numerator / base.denominator
