"""The ffmpeg command as a decoder, with frames numbered as PyAV numbers them.

PyAV reads the times of frames from the packets, and ffmpeg returns only the frames at the wanted times. A file whose
packets do not tell the times is decoded twice: once to list its frames, once to read them. Animated WebP, whose packets
PyAV does not read, is such a file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import av
import numpy as np

from framestream.pipeline.media.decoders.base import DecoderConfig, PredictFn
from framestream.pipeline.media.decoders.ffmpeg_program import (
    FfmpegPass,
    check_ffmpeg_device,
    find_ffmpeg,
    read_frames,
)
from framestream.pipeline.media.errors import MAX_PIXELS, MediaError, check_file
from framestream.pipeline.media.file_kinds import is_animated_webp
from framestream.pipeline.media.video import (
    NO_TIME,
    PROGRAM_STREAM,
    InexactSeekError,
    PacketScan,
    ResizeFn,
    VideoSource,
    make_source,
    scan_packets,
)
from framestream.pipeline.media.video_stream import frame_pixels

SEEK_FRAMES = 48  #: a clip that begins after this many frames is read from a key frame on
WITHOUT_TIMES = ("avi", PROGRAM_STREAM)  #: formats in which frames need not have times of their own
MAX_RANGES = 1000  #: ranges of wanted frames that are named to ffmpeg; with more, it writes all frames in between
_THUMBNAIL = {"scale": {"w": "16", "h": "16", "flags": "neighbor"}}  #: filters of frames whose time alone is read


class FfmpegDecoder:
    """Reads with the ffmpeg command on the path, or that of imageio-ffmpeg.

    Args:
        config: device and time limit.
        is_pinned: use the command of imageio-ffmpeg in any case.
    """

    def __init__(self, config: DecoderConfig, is_pinned: bool = False) -> None:
        self._config, self._is_pinned = config, is_pinned

    def open(self, path: Path, resize: ResizeFn) -> VideoSource:
        path = check_file(path)
        if file_is_animated_webp(path):
            raise InexactSeekError("an animated WebP does not list its frames")
        scan = scan_packets(path)
        if not len(scan.keys) or not scan.timed or scan.container in WITHOUT_TIMES:
            raise InexactSeekError("frames or their times are missing, or versions of FFmpeg guess other times")

        def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
            wanted = scan.ticks[numbers].tolist()
            for start in _starts(scan, numbers):
                found = 0
                with contextlib.closing(self._wanted_frames(path, scan, wanted, start)) as frames:
                    for frame in frames:
                        found += 1
                        yield resize(frame_pixels(frame))
                if found == len(wanted):
                    return
                if found:
                    break
            raise InexactSeekError(f"ffmpeg gives {found} of {len(wanted)} frames at their times")

        return make_source(scan, scan.ticks, decode_frames, scan.damaged)

    def _wanted_frames(
        self, path: Path, scan: PacketScan, wanted: Sequence[int], start: float | None
    ) -> Generator[av.VideoFrame, None, None]:
        """Yield the frames at the ticks ``wanted``, up to the first that is missing."""
        filters = {"select": {"expr": _choice("pts", _ranges(wanted, scan.ticks))}}
        run = replace(self._run(path, scan), filters=filters, start=start)
        found = 0
        with contextlib.closing(read_frames(find_ffmpeg(self._is_pinned), run, self._config.seconds, [])) as frames:
            for tick, frame in frames:
                if tick == wanted[found]:
                    yield frame
                    found += 1
                if found == len(wanted) or tick > wanted[found]:
                    return

    def open_sequential(self, path: Path, resize: ResizeFn, predict: PredictFn, min_frames: int) -> VideoSource:
        path = check_file(path)
        scan = _scan_webp(path) if file_is_animated_webp(path) else scan_packets(path)
        run, (ticks, faults) = self._list_frames(path, scan, min_frames)
        if not ticks:
            if self._config.hwaccel != "none":
                check_ffmpeg_device(self._config.hwaccel)
            raise MediaError("corrupt", path, f"ffmpeg decodes no frame of it ({faults[0] if faults else 'no error'})")
        known = np.array(ticks if scan.timed else [NO_TIME] * len(ticks), dtype=np.int64)  # else ffmpeg invents times
        if scan.timed and len(scan.ticks) == len(ticks):
            known = scan.ticks

        def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
            wanted = numbers.tolist()
            ranges = _ranges(wanted, np.arange(len(ticks)))
            chosen = replace(run, filters={"select": {"expr": _choice("n", ranges)}}, count=_length(ranges))
            written = chain.from_iterable(range(first, last + 1) for first, last in ranges)
            frames = read_frames(find_ffmpeg(self._is_pinned), chosen, self._config.seconds, [])
            needed = frozenset(wanted)
            with contextlib.closing(frames):
                for number, (_, frame) in zip(written, frames, strict=False):
                    if number in needed:
                        yield resize(frame_pixels(frame))

        return make_source(scan, known, decode_frames, scan.damaged or bool(faults))

    def _list_frames(
        self, path: Path, scan: PacketScan, min_frames: int
    ) -> tuple[FfmpegPass, tuple[list[int], list[str]]]:
        """Decode all frames, and return the run that did, and their ticks with what stopped it.

        Errors stop it. A stream that gives fewer than ``min_frames`` so is only unusual if ffmpeg reports no error by
        itself.
        """
        run = self._run(path, scan)
        ticks, faults = self._ticks(run)
        if faults and len(ticks) < min_frames:
            lenient = replace(run, strict=False)
            all_ticks, errors = self._ticks(lenient)
            if not errors:
                return lenient, (all_ticks, [])
        return run, (ticks, faults)

    def _ticks(self, run: FfmpegPass) -> tuple[list[int], list[str]]:
        faults: list[str] = []
        listing = replace(run, filters=_THUMBNAIL, pixel_format="gray")
        frames = read_frames(find_ffmpeg(self._is_pinned), listing, self._config.seconds, faults)
        return [tick for tick, _ in frames], faults

    def _run(self, path: Path, scan: PacketScan) -> FfmpegPass:
        pixel_format = "rgba" if scan.is_transparent else "rgb24"
        return FfmpegPass(path, scan.stream, scan.base, pixel_format=pixel_format, hwaccel=self._config.hwaccel)


def file_is_animated_webp(path: Path) -> bool:
    """Return whether a file is an animated WebP image."""
    with open(path, "rb") as file:
        return is_animated_webp(file.read(64))


def _scan_webp(path: Path) -> PacketScan:
    """Return what is known of an animated WebP before it is decoded; its times are milliseconds."""
    with open(path, "rb") as file:
        head = file.read(64)
    width, height = (1 + int.from_bytes(head[place : place + 3], "little") for place in (24, 27))
    if width * height > MAX_PIXELS:
        raise MediaError("unsupported", path, f"{width} x {height} pixels are too many")
    none = np.empty(0, dtype=np.int64)
    return PacketScan(
        ticks=none,
        keys=none,
        seeks=none,
        timed=True,
        decoding=none,
        seekable=False,
        damaged=8 + int.from_bytes(head[4:8], "little") > path.stat().st_size,
        origin=0.0,
        end=0.0,
        promised_end=0.0,
        base=Fraction(1, 1000),
        rate=None,
        nominal=0.0,
        container="webp_anim",
        stream=0,
        is_transparent=True,
    )


def _starts(scan: PacketScan, numbers: np.ndarray) -> list[float | None]:
    """Return seconds from which the frames ``numbers`` may be read: near their first one if that is far, and None.

    Reading begins one key frame early, because frames after a key frame may refer back.
    """
    if not scan.seekable:
        return [None]
    key = int(np.searchsorted(scan.keys, scan.ticks[numbers[0]], "right")) - 2
    if key < 1 or np.searchsorted(scan.ticks, scan.keys[key]) < SEEK_FRAMES:
        return [None]
    return [float(scan.seeks[key] * scan.base), None]


def _ranges(wanted: Sequence[int], values: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and last value of each run of neighbors among the ascending ``wanted`` of ``values``.

    It is one range of all if these are too many for a command.
    """
    places = np.searchsorted(values, wanted).tolist()
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(places)) if b != a + 1), len(places)]
    if len(breaks) > MAX_RANGES + 1:
        breaks = [0, len(places)]
    return [(wanted[a], wanted[b - 1]) for a, b in pairwise(breaks)]


def _choice(variable: str, ranges: Sequence[tuple[int, int]]) -> str:
    """Return the expression that is true where ``variable`` is in one of ``ranges``."""
    return "+".join(f"between({variable},{first},{last})" for first, last in ranges)


def _length(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(last + 1 - first for first, last in ranges)
