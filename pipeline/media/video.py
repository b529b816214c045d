"""Read frames of a video file by number, with PyAV.

A source knows the time of each of its frames before any is decoded. Clips and samplers need these times.

* ``open_video`` reads times and key frames from the packets. To reach a frame it seeks to the nearest key frame before
  it, if that skips more frames than a seek costs (:data:`SEEK_FRAMES`), and otherwise decodes on. Frames that are
  neither wanted nor referred to by others are not decoded. A frame is accepted only if it carries exactly the requested
  time and everything on the way to it decoded. Otherwise :class:`InexactSeekError` asks for ``open_sequential``.
* ``open_sequential`` decodes everything in order and counts the frames, up to the first damaged position. It stores the
  frames that will probably be wanted, judged by the file's packets. It decodes a second time only if others are wanted.

Other decoders (:mod:`framestream.pipeline.media.decoders`) number their frames by the packets that PyAV lists here.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from framestream.pipeline.media.errors import MediaError, check_file, is_truncated
from framestream.pipeline.media.video_stream import (
    SEEKABLE,
    DamagedStreamError,
    decode_stream,
    frame_pixels,
    open_stream,
    read_packets,
)

#: A seek costs about as much as decoding this many frames, because the frames buffered for reordering are lost.
SEEK_FRAMES, SEEK_FRAMES_IN_ORDER = 6, 1
BY_DECODING_TIME = ("mpegts", "mpeg")  #: formats in which a seek leads to the packet with that decoding time
#: A packet of this format may hold the beginnings of several frames and the time of one. After a seek, times are given
#: to other frames than in reading from the beginning.
PROGRAM_STREAM = "mpeg"
#: The last frame is held while sound goes on for more than this many seconds after it.
HELD_SECONDS = 1.0
NO_TIME = -(2**63)  #: in place of an unknown time in ticks
_TOLERANCE = 1e-6  #: seconds by which a frame may miss a clip's edge: times are sums of binary fractions

ResizeFn = Callable[[np.ndarray], np.ndarray]  #: applied to each frame, uint8 (H, W, 3), as soon as it is decoded


def identity(frame: np.ndarray) -> np.ndarray:
    """Return the frame unchanged: the :data:`ResizeFn` that does nothing."""
    return frame


class InexactSeekError(Exception):
    """Seeking in this file does not lead to the requested frames; read it with ``open_sequential``."""


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """Times of a video's N frames as the file states them."""

    ticks: np.ndarray  #: int64 (N,), ascending: presentation times in units of ``base``
    base: Fraction  #: seconds per tick
    rate: Fraction  #: frames per second as the container states them


@dataclass(frozen=True, slots=True)
class VideoSource:
    """An opened video of N frames."""

    seconds: np.ndarray  #: float64 (N,), ascending: when each frame is shown, from the start of the file
    fps: float
    end: float  #: second at which the last frame stops being shown
    damaged: bool  #: the file is damaged: it contained or promises more than these N frames
    #: decodes the frames with the given ascending, distinct numbers: RGB pixels after resizing
    decode_frames: Callable[[np.ndarray], Iterator[np.ndarray]]
    frame_times: FrameTimes | None = None  #: None for a GIF, a folder, or a file without times or a rate
    held_until: float = 0.0  #: second up to which players hold the last frame, if that is after ``end``
    promised_end: float = 0.0  #: second at which the file says that it ends; 0 if it does not say so


def open_video(path: str | Path, resize: ResizeFn = identity, hwaccel: str = "none") -> VideoSource:
    """Open a video whose frames are found by their times; nothing is decoded before a frame is requested.

    Args:
        hwaccel: kind of device that decodes (:func:`framestream.pipeline.media.video_stream.open_stream`).

    Raises:
        MediaError: the file cannot be opened or has no video.
        InexactSeekError: packets have no times of their own. ``decode_frames`` also raises it, if a frame is not where
            its packet says, or something on the way to it does not decode.
    """
    path = check_file(path)
    scan = scan_packets(path)
    ticks, key_ticks = scan.ticks, scan.keys
    if not len(key_ticks) or not scan.timed or not scan.seekable:
        raise InexactSeekError("frames or their times are missing, or a seek gives other frames")
    key_numbers = np.searchsorted(ticks, key_ticks)

    def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
        targets = ticks[numbers].tolist()
        keys = np.maximum(np.searchsorted(key_ticks, targets, "right") - 1, 0)  # nearest key frame before each target
        with open_stream(path, True, hwaccel) as (container, stream):
            needed, current = frozenset(targets), -1
            limit = SEEK_FRAMES if stream.codec_context.has_b_frames else SEEK_FRAMES_IN_ORDER
            frames, back = decode_stream(container, stream, needed), 0
            for number, tick, key in zip(numbers.tolist(), targets, keys.tolist(), strict=True):
                is_near = key_numbers[max(key - back, 0)] - current <= limit
                frame = _frame_at(frames, tick) if is_near else None
                while frame is None and back < 2:  # in open groups of pictures, frames after a key frame refer back
                    _seek(container, stream, int(scan.seeks[max(key - back, 0)]))
                    frames = decode_stream(container, stream, needed, int(key_ticks[key]))
                    frame = _frame_at(frames, tick)
                    back += frame is None
                if frame is None:
                    raise InexactSeekError(f"no frame at {tick}")
                current = number
                yield resize(frame_pixels(frame))

    return make_source(scan, ticks, decode_frames, scan.damaged)


def _seek(container: InputContainer, stream: VideoStream, time: int) -> None:
    try:
        container.seek(time, stream=stream)
    except (av.FFmpegError, OverflowError) as error:
        raise InexactSeekError(f"the container cannot seek to {time} ({error})") from None


def _frame_at(frames: Iterator[av.VideoFrame], tick: int) -> av.VideoFrame | None:
    """Return the frame shown at ``tick``; None if ``frames`` skip it, are not in order, or end or break before it."""
    last = None
    try:
        for frame in frames:
            if frame.pts is None or (last is not None and frame.pts <= last) or frame.pts >= tick:
                return frame if frame.pts == tick else None
            last = frame.pts
    except DamagedStreamError:
        pass
    return None


def open_sequential(
    path: str | Path,
    resize: ResizeFn = identity,
    predict: Callable[[VideoSource], Collection[int]] | None = None,
    min_frames: int = 1,
    hwaccel: str = "none",
) -> VideoSource:
    """Open a video by decoding it from its first frame to its end, or to the first position that does not decode.

    Args:
        predict: returns the numbers of the frames that will be wanted, given the source that the packets promise. These
            frames are stored after resizing, and returned if no others are requested.
        min_frames: if a strict decoder yields fewer frames, a decoder that conceals some errors is tried. Its frames
            are used if it reports no error: some encoders write such streams.
        hwaccel: as for :func:`open_video`.

    Raises:
        MediaError: the file cannot be opened, has no video, or no frame of it decodes.
    """
    path = check_file(path)
    scan = scan_packets(path)
    predicted: Collection[int] = ()
    if predict and len(scan.ticks):
        predicted = predict(make_source(scan, scan.ticks, lambda _: iter(()), scan.damaged))
    strict, run = _best_run(path, resize, frozenset(predicted), min_frames, hwaccel)
    if not len(run.ticks):
        reason, text = "corrupt", "no frame of it decodes"
        if scan.damaged:
            reason, text = "truncated", "it ends before a frame decodes"
        raise MediaError(reason, path, f"has a video stream, but {text}; fetch the file again")

    def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
        wanted = numbers.tolist()
        if run.stored.keys() >= set(wanted):
            yield from (run.stored[number] for number in wanted)
            return
        with open_stream(path, strict, hwaccel) as (container, stream), contextlib.suppress(DamagedStreamError):
            rest = iter(wanted)
            target = next(rest, None)
            for number, frame in enumerate(decode_stream(container, stream)):
                if number == target:
                    yield resize(frame_pixels(frame))
                    target = next(rest, None)
                if target is None:
                    return

    return make_source(scan, run.ticks, decode_frames, scan.damaged or run.broken or run.has_faults)


@dataclass(frozen=True, slots=True)
class PacketScan:
    """What a file and its packets state, up to the first damaged packet."""

    ticks: np.ndarray  #: int64 (N,), ascending: presentation times of the packets
    keys: np.ndarray  #: int64 (K,), ascending: presentation times of the key frames
    seeks: np.ndarray  #: int64 (K,): times to which a seek leads to the key frames
    timed: bool  #: every packet has a time of its own
    decoding: np.ndarray  #: int64 (N,), ascending: decoding times of the packets; (0,) if one has none
    seekable: bool  #: a seek leads to the frames that the packets state, and the decoder needs nothing from before
    damaged: bool  #: a packet is damaged, or there are fewer than the container or its length promises
    origin: float  #: second that players show as 0, unless a frame is shown before it
    end: float  #: second at which the last of the streams, sound included, ends; 0 if unknown
    promised_end: float  #: the same, or where the frames end that the container's index lists
    base: Fraction  #: seconds per tick
    rate: Fraction | None  #: frames per second as the container states them
    nominal: float  #: the same, or the decoder's guess; 0 if unknown
    container: str  #: the format, as FFmpeg calls it
    stream: int  #: number of the video stream in the file
    is_transparent: bool  #: pixels have alpha, or colors of a palette that may have


def scan_packets(path: Path) -> PacketScan:
    """Read the packets of a file without decoding them."""
    with open_stream(path) as (container, stream):
        packets = _read_packets(container, stream)
        ticks, keys = np.sort(np.array(packets.times, dtype=np.int64)), np.array(packets.keys, dtype=np.int64)
        order = np.argsort(keys)
        timed = NO_TIME not in ticks[:1] and bool((np.diff(ticks) > 0).all())
        promised = _promised_frames(stream, len(ticks))
        damaged = packets.damaged or len(ticks) < promised or is_truncated(path)
        if damaged and timed and packets.last_dts is not None:  # missing frames may be shown before the last ones read
            ticks, order = ticks[ticks <= packets.last_dts], order[keys[order] <= packets.last_dts]
        if stream.time_base is None:
            raise MediaError("corrupt", path, "its video stream has no time base; fetch the file again")
        codec = stream.codec_context
        nominal, end = float(stream.average_rate or stream.guessed_rate or 0), max(container.duration or 0, 0)
        return PacketScan(
            ticks=ticks,
            keys=keys[order],
            seeks=np.array(packets.seeks, dtype=np.int64)[order],
            timed=timed,
            decoding=np.sort(np.array([] if NO_TIME in packets.decoding else packets.decoding, dtype=np.int64)),
            seekable=container.format.name != PROGRAM_STREAM and codec.name in SEEKABLE and codec.pix_fmt != "pal8",
            damaged=damaged,
            origin=max(container.start_time or 0, 0) / av.time_base,  # transport streams begin at any time
            end=end / av.time_base,
            promised_end=max(end / av.time_base, promised / nominal if nominal else 0.0),
            base=stream.time_base,
            rate=stream.average_rate,
            nominal=nominal,
            container=container.format.name,
            stream=stream.index,
            is_transparent=codec.pix_fmt is None or codec.pix_fmt == "pal8" or _has_alpha(codec.pix_fmt),
        )


def _has_alpha(pixel_format: str) -> bool:
    return any(component.is_alpha for component in av.VideoFormat(pixel_format).components)


@dataclass(slots=True)
class _Packets:
    """Times of the packets of a stream in file order, in arrays of 8 bytes a frame: a 10-hour video has a million."""

    times: array[int] = field(default_factory=lambda: array("q"))  #: presentation times, NO_TIME if unknown
    decoding: array[int] = field(default_factory=lambda: array("q"))  #: decoding times, NO_TIME if unknown
    keys: array[int] = field(default_factory=lambda: array("q"))  #: presentation times of the key frames
    seeks: array[int] = field(default_factory=lambda: array("q"))  #: times to which a seek leads to them
    last_dts: int | None = None  #: decoding time of the last packet that has one
    damaged: bool = False  #: reading stopped at a damaged packet


def _read_packets(container: InputContainer, stream: VideoStream) -> _Packets:
    """Collect the times of all packets, up to the first damaged one after a key frame."""
    packets = _Packets()
    seeks_by_dts = container.format.name in BY_DECODING_TIME
    try:
        for packet, is_damaged in read_packets(container, stream):
            packets.last_dts = packets.last_dts if packet.dts is None else packet.dts
            if is_damaged and packets.keys:
                packets.damaged = True
                break
            if not packet.size or packet.is_discard:
                continue
            time = NO_TIME if packet.pts is None else packet.pts
            packets.times.append(time)
            packets.decoding.append(NO_TIME if packet.dts is None else packet.dts)
            if packet.is_keyframe:
                packets.keys.append(time)
                packets.seeks.append(packet.dts if seeks_by_dts and packet.dts is not None else time)
    except av.FFmpegError as error:
        packets.damaged = not isinstance(error, EOFError)
    return packets


def _promised_frames(stream: VideoStream, found: int) -> int:
    """Count the frames that the container's index lists, without empty ones and those that an edit list hides.

    Returns 0 if the index lists at most ``found`` frames, or states no number.
    """
    if stream.frames <= found:
        return 0
    entries = stream.index_entries
    return sum(entry.size > 0 and not entry.is_discard for entry in entries) if len(entries) else stream.frames


def make_source(
    scan: PacketScan, ticks: np.ndarray, decode_frames: Callable[[np.ndarray], Iterator[np.ndarray]], damaged: bool
) -> VideoSource:
    """Make a source of frames at ``ticks``, or of evenly spaced frames if these are not valid times."""
    frame_times = FrameTimes(ticks, scan.base, scan.rate) if scan.rate else None
    if ticks[0] == NO_TIME or not (np.diff(ticks) > 0).all():
        frame_times = None
        if len(scan.decoding) == len(ticks):  # frames without times of their own, as of H.264 in AVI
            ticks = scan.decoding
    if ticks[0] == NO_TIME or not (np.diff(ticks) > 0).all():
        seconds = np.arange(len(ticks)) / (scan.nominal or 1.0)
    else:
        seconds = ticks * float(scan.base)
        seconds = seconds - min(scan.origin, float(seconds[0]))
    last = 1 / (scan.nominal or 1.0)  # how long the last frame is shown: as long as the others
    if len(seconds) > 1:
        last = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    measured = len(seconds) / (seconds[-1] - seconds[0] + last)
    stated = scan.nominal or measured
    fps = stated if abs(stated - measured) <= 0.1 * measured else measured  # some containers state a wrong rate
    end = float(seconds[-1] + last)
    held = scan.end if not damaged and scan.end > end + HELD_SECONDS else end
    return VideoSource(seconds, float(fps), end, damaged, decode_frames, frame_times, held, scan.promised_end)


@dataclass(frozen=True, slots=True)
class _Run:
    """Result of decoding a stream once."""

    ticks: np.ndarray  #: int64 (N,): times of the frames, NO_TIME if unknown
    broken: bool  #: decoding stopped at a damaged position
    has_faults: bool  #: something before the first frame did not decode
    stored: dict[int, np.ndarray]  #: resized frames by number


def _best_run(path: Path, resize: ResizeFn, store: Collection[int], min_frames: int, hwaccel: str) -> tuple[bool, _Run]:
    """Decode strictly, or leniently if the stream is only unusual; return whether strictly, and the result."""
    run = _run(path, True, resize, store, hwaccel)
    if run.broken and len(run.ticks) < min_frames:
        lenient = _run(path, False, resize, store, hwaccel)
        if not lenient.broken:  # an unusual stream decodes without any error
            return False, lenient
    return True, run


def _run(path: Path, strict: bool, resize: ResizeFn, store: Collection[int], hwaccel: str) -> _Run:
    ticks, stored, broken = array("q"), {}, False
    faults: list[Exception] = []
    with open_stream(path, strict, hwaccel) as (container, stream):
        try:
            for number, frame in enumerate(decode_stream(container, stream, faults=faults)):
                ticks.append(NO_TIME if frame.pts is None else frame.pts)
                if number in store:
                    stored[number] = resize(frame_pixels(frame))
        except DamagedStreamError:
            broken = True
    return _Run(np.array(ticks, dtype=np.int64), broken, bool(faults), stored)


def clip_bounds(
    path: str | Path, source: VideoSource, start: float | None, end: float | None
) -> tuple[int, int, float]:
    """Return the frame numbers [first, stop) of a clip and its duration in seconds.

    Args:
        path: for messages.
        source: of the complete file.
        start: second at which the clip begins; None for the beginning.
        end: second at which it ends; None for the end.

    Raises:
        MediaError: there are no frames between them.
    """
    if start is None and end is None:
        return 0, len(source.seconds), len(source.seconds) / source.fps
    low = 0.0 if start is None else max(start, 0.0)
    last = source.end if end is None else max(source.end, source.held_until)
    high = last if end is None else min(end, last)
    first = max(int(np.searchsorted(source.seconds, low + _TOLERANCE, "right")) - 1, 0)  # the frame shown at ``low``
    stop = int(np.searchsorted(source.seconds, high + _TOLERANCE, "right"))
    if low < high and first < stop:  # false also for times that are not numbers
        return first, stop, round(high - low, 6)
    lost = source.damaged and low >= source.end and (end is None or end > low)
    where = f"the file is damaged at {source.end:.2f} s" if lost else f"the video ends at {source.end:.2f} s"
    until = "the end" if end is None else f"{end} s"
    raise MediaError("truncated" if lost else "bad_clip", path, f"no frames from {start or 0} s to {until}; {where}")
