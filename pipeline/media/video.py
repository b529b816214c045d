"""Frames out of video files by number, with PyAV.

A source knows the second of each of its frames before any is decoded, which is what clips and samplers need:

* ``open_video`` reads times and key frames from the packets. A wanted frame is reached from the nearest key frame
  before it, by seeking there where that leaves out more frames than a seek costs (:data:`SEEK_FRAMES`), otherwise by
  decoding on; pictures that are neither wanted nor needed by others are not decoded. A frame is only taken when it
  carries the very time that was asked for and everything on the way to it decoded. Where that fails,
  :class:`InexactError` asks for:
* ``open_straight`` decodes everything in order and counts what comes out, up to the first damaged place. Frames that
  the file's packets make likely to be wanted are kept on the way; only if others turn out to be wanted is it decoded
  once more.

decord is not used to read sources, because its frames carry no time that could be checked: decord2 3.4 gives up
skipping to a frame after 10,000 polls and returns another one without an error (9 to 18 of 28 frames of a 720p clip
on a busy machine, others at every run), and so do MPEG-4 video with B-frames and open groups of pictures on any.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from framestream.pipeline.media.errors import MAX_PIXELS, MediaError, check_file, diagnose_open_error, is_truncated

#: Containers that are opened. Playlists and scripts (HLS, concat, SDP ...) are not: they make ffmpeg open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,rm,h264,hevc,m4v,ivf,mxf,nut,dv"
)
#: A seek costs about as much as decoding so many frames: those that a decoder holds back to reorder are lost by it.
SEEK_FRAMES, SEEK_FRAMES_IN_ORDER = 6, 1
BY_DECODING_TIME = ("mpegts", "mpeg")  #: formats in which a seek leads to the packet with that decoding time
#: Decoders that can leave out pictures on which no other depends, whatever the stream is made of.
SKIPPING = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
_NO_TIME = -(2**63)

ResizeFn = Callable[[np.ndarray], np.ndarray]  #: what is made of a picture, uint8 (H, W, 3), as soon as it is there


def identity(picture: np.ndarray) -> np.ndarray:
    """The :data:`Shrink` that changes nothing."""
    return picture


class InexactSeekError(Exception):
    """Seeking in this file does not lead to the frames asked for; read it straight through."""


class _BrokenError(Exception):
    """The stream is damaged here."""


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """Times of a video's N frames as the file has them."""

    ticks: np.ndarray  #: int64 (N,), ascending: presentation times in units of ``base``
    base: Fraction  #: seconds of a tick
    rate: Fraction  #: frames a second as the container states them


@dataclass(frozen=True, slots=True)
class VideoSource:
    """An opened video of N frames."""

    seconds: np.ndarray  #: float64 (N,), ascending: when each frame is shown, from the start of the file
    fps: float
    end: float  #: second at which the last frame stops being shown
    recovered: bool  #: the file is damaged: more frames than these were in it, or are promised
    pictures: Callable[[np.ndarray], Iterator[np.ndarray]]  #: shrunk RGB pictures of ascending, distinct frame numbers
    clock: FrameTimes | None = None  #: None for a GIF, a folder, or a file without times or a rate


def open_video(path: str | Path, shrink: ResizeFn = identity) -> VideoSource:
    """Open a video whose frames are found by their times; only its packets are read before a frame is asked for.

    Raises:
        MediaError: the file cannot be opened or has no video.
        InexactError: packets have no times of their own; later, from ``pictures``, a frame is not where its packet
            says, or something on the way to it does not decode.
    """
    path = check_file(path)
    scan = _scan(path)
    ticks, starts = scan.ticks, scan.keys
    if not len(starts) or not scan.timed:
        raise InexactSeekError("frames or their times are missing")
    places = np.searchsorted(ticks, starts)  # number of each key frame

    def pictures(wanted: np.ndarray) -> Iterator[np.ndarray]:
        targets = ticks[wanted].tolist()
        keys = np.maximum(np.searchsorted(starts, targets, "right") - 1, 0)  # the key frame to begin at, for each
        with _open(path, strict=True) as (container, stream):
            needed, shown = frozenset(targets), -1
            limit = SEEK_FRAMES if stream.codec_context.has_b_frames else SEEK_FRAMES_IN_ORDER
            frames, back = _decode(container, stream, needed), 0
            for number, tick, key in zip(wanted.tolist(), targets, keys.tolist(), strict=True):
                near = places[max(key - back, 0)] - shown <= limit
                frame = _at(frames, tick) if near else None
                while frame is None and back < 2:  # in open groups of pictures what follows a key frame refers back
                    container.seek(int(scan.seeks[max(key - back, 0)]), stream=stream)
                    frames = _decode(container, stream, needed, int(starts[key]))
                    frame = _at(frames, tick)
                    back += frame is None
                if frame is None:
                    raise InexactSeekError(f"no frame at {tick}")
                shown = number
                yield shrink(_pixels(frame))

    return _source(scan, ticks, pictures, scan.damaged)


def open_sequential(
    path: str | Path,
    shrink: ResizeFn = identity,
    likely: Callable[[VideoSource], Collection[int]] | None = None,
    least: int = 1,
) -> VideoSource:
    """Open a video by decoding it from its first frame to its end, or to the first place that does not decode.

    Args:
        likely: gives the numbers of the frames that will be wanted of a source, here of what the packets promise;
            their shrunk pictures are kept, and handed out if no others are asked for.
        least: where a decoder that refuses every fault gets fewer frames than these, one that overlooks some is tried,
            and believed if it finds nothing wrong: some encoders write such streams.

    Raises:
        MediaError: the file cannot be opened, has no video, or no frame of it decodes.
    """
    path = check_file(path)
    scan = _scan(path)
    wanted = likely(_source(scan, scan.ticks, lambda _: iter(()), scan.damaged)) if likely and len(scan.ticks) else ()
    strict, run = True, _run(path, True, shrink, frozenset(wanted))
    if run.broken and len(run.ticks) < least:  # unless it is only unusual: then it decodes without a complaint
        patched = _run(path, False, shrink, frozenset(wanted))
        strict, run = (True, run) if patched.broken else (False, patched)
    if not len(run.ticks):
        reason, text = "corrupt", "no frame of it decodes"
        if scan.damaged:
            reason, text = "truncated", "it ends before a frame decodes"
        raise MediaError(reason, path, f"has a video stream, but {text}; fetch the file again")

    def pictures(wanted: np.ndarray) -> Iterator[np.ndarray]:
        numbers = wanted.tolist()
        if run.kept.keys() >= set(numbers):
            yield from (run.kept[number] for number in numbers)
            return
        with _open(path, strict) as (container, stream), contextlib.suppress(_BrokenError):
            rest = iter(numbers)
            target = next(rest, None)
            for number, frame in enumerate(_decode(container, stream)):
                if number == target:
                    yield shrink(_pixels(frame))
                    target = next(rest, None)
                if target is None:
                    return

    return _source(scan, run.ticks, pictures, scan.damaged or run.broken or run.faults)


@dataclass(frozen=True, slots=True)
class _Scan:
    """What a file and its packets say, up to the first damaged one."""

    ticks: np.ndarray  #: int64 (N,), ascending: presentation times of the packets
    keys: np.ndarray  #: int64 (K,), ascending: those of the key frames
    seeks: np.ndarray  #: int64 (K,): the times to which a seek leads to them
    timed: bool  #: every packet has a time of its own
    damaged: bool  #: a packet is damaged, or fewer are there than the container or its length promise
    origin: float  #: second that players show as 0
    base: Fraction  #: seconds of a tick
    rate: Fraction | None  #: frames a second as the container states them
    nominal: float  #: the same, or what the decoder makes of the stream; 0 where nobody knows


def _scan(path: Path) -> _Scan:
    """Times are gathered in arrays, 8 bytes a frame: a video of 10 hours has a million."""
    times, keys, seeks, broken, limit = array("q"), array("q"), array("q"), False, None
    with _open(path) as (container, stream):
        by_decoding_time = container.format.name in BY_DECODING_TIME
        try:
            for packet in container.demux(stream):
                limit = limit if packet.dts is None else packet.dts
                if packet.is_corrupt and keys:
                    broken = True
                    break
                if packet.size and not packet.is_discard:
                    times.append(_NO_TIME if packet.pts is None else packet.pts)
                    if packet.is_keyframe:
                        keys.append(times[-1])
                        seeks.append(packet.dts if by_decoding_time and packet.dts is not None else times[-1])
        except av.FFmpegError as error:
            broken = not isinstance(error, EOFError)
        ticks, starts = np.sort(np.array(times, dtype=np.int64)), np.array(keys, dtype=np.int64)
        order = np.argsort(starts)
        timed = _NO_TIME not in ticks[:1] and bool((np.diff(ticks) > 0).all())
        damaged = broken or len(ticks) < _promised_frames(stream, len(ticks)) or is_truncated(path)
        if damaged and timed and limit is not None:  # what was to come may be shown before what is there
            ticks, order = ticks[ticks <= limit], order[starts[order] <= limit]
        return _Scan(
            ticks=ticks,
            keys=starts[order],
            seeks=np.array(seeks, dtype=np.int64)[order],
            timed=timed,
            damaged=damaged,
            origin=max(container.start_time or 0, 0) / av.time_base,  # transport streams begin anywhere
            base=stream.time_base,
            rate=stream.average_rate,
            nominal=float(stream.average_rate or stream.guessed_rate or 0),
        )


def _promised_frames(stream: VideoStream, found: int) -> int:
    """Frames that the container's index lists, less empty ones and those that an edit list hides; 0 if no more than
    ``found``, or if it does not say."""
    if stream.frames <= found:
        return 0
    entries = stream.index_entries
    return sum(entry.size > 0 and not entry.is_discard for entry in entries) if len(entries) else stream.frames


def _source(
    scan: _Scan, ticks: np.ndarray, pictures: Callable[[np.ndarray], Iterator[np.ndarray]], salvaged: bool
) -> VideoSource:
    """A source of frames at ``ticks``; evenly spaced ones where these are no times."""
    clock = FrameTimes(ticks, scan.base, scan.rate) if scan.rate and scan.base else None
    seconds = ticks * float(scan.base) - scan.origin
    if ticks[0] == _NO_TIME or not (np.diff(ticks) > 0).all():
        clock, seconds = None, np.arange(len(ticks)) / (scan.nominal or 1.0)
    last = 1 / (scan.nominal or 1.0)  # how long the last frame is shown: as long as the others
    if len(seconds) > 1:
        last = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    measured = len(seconds) / (seconds[-1] - seconds[0] + last)
    stated = scan.nominal or measured
    fps = stated if abs(stated - measured) <= 0.1 * measured else measured  # some containers state what is not so
    return VideoSource(seconds, float(fps), float(seconds[-1] + last), salvaged, pictures, clock)


@dataclass(frozen=True, slots=True)
class _Run:
    """What came out of decoding a stream once."""

    ticks: np.ndarray  #: int64 (N,): times of the frames, _NO_TIME where they have none
    broken: bool  #: up to a damaged place
    faults: bool  #: something before the first frame did not decode
    kept: dict[int, np.ndarray]  #: shrunk pictures by frame number


def _run(path: Path, strict: bool, shrink: ResizeFn, keep: Collection[int]) -> _Run:
    ticks, kept, broken, faults = array("q"), {}, False, []
    with _open(path, strict) as (container, stream):
        try:
            for number, frame in enumerate(_decode(container, stream, faults=faults)):
                ticks.append(_NO_TIME if frame.pts is None else frame.pts)
                if number in keep:
                    kept[number] = shrink(_pixels(frame))
        except _BrokenError:
            broken = True
    return _Run(np.array(ticks, dtype=np.int64), broken, bool(faults), kept)


@contextlib.contextmanager
def _open(path: Path, strict: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and its main video stream, or the MediaError that says why there is none.

    ``strict``: the decoder refuses what it would otherwise patch up.
    """
    try:
        container = av.open(f"file:{path}", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except av.ArgumentError:
        raise MediaError("unsupported", path, "is in a container format that is not read") from None
    except (av.FFmpegError, ValueError):
        raise diagnose_open_error(path) from None
    with container:
        if not len(container.streams):
            raise diagnose_open_error(path)
        stream = container.streams.best("video")
        if stream is not None and stream.disposition & Disposition.attached_pic:
            moving = (other for other in container.streams.video if not other.disposition & Disposition.attached_pic)
            stream = next(moving, None)
        if stream is None:
            raise MediaError("no_video_stream", path, "has no video stream")
        codec = stream.codec_context
        if codec is None:
            raise MediaError("unsupported", path, "its video is damaged or in a codec that is not read")
        if codec.width * codec.height > MAX_PIXELS:
            raise MediaError("unsupported", path, f"{codec.width} x {codec.height} pixels are too many")
        codec.thread_count = 1
        codec.options = {"max_pixels": str(MAX_PIXELS), **({"err_detect": "explode"} if strict else {})}
        yield container, stream


def _at(frames: Iterator[av.VideoFrame], tick: int) -> av.VideoFrame | None:
    """The frame shown at ``tick``; None where ``frames`` pass it by, are not in order, or end or break before it."""
    last = None
    try:
        for frame in frames:
            if frame.pts is None or (last is not None and frame.pts <= last) or frame.pts >= tick:
                return frame if frame.pts == tick else None
            last = frame.pts
    except _BrokenError:
        pass
    return None


def _decode(
    container: InputContainer,
    stream: VideoStream,
    needed: Collection[int] | None = None,
    since: int | None = None,
    faults: list[Exception] | None = None,
) -> Iterator[av.VideoFrame]:
    """Frames in display order from where the container stands, up to its end.

    What precedes the first key frame in the file or is shown before it may lack what it refers to, and is left out.

    Args:
        needed: times of the frames that will be looked at: others need not come.
        since: time before which faults do not matter; that of the first key frame if None.
        faults: gets the errors of what is left out at the beginning.

    Raises:
        _BrokenError: after the last frame before a damaged place.
    """
    codec = stream.codec_context
    skips, skipping = needed is not None and codec.name in SKIPPING, None
    begun, broken, limit = False, False, None
    try:
        for packet in container.demux(stream):
            limit = packet.dts  # no frame from here on is shown before
            if packet.is_corrupt and begun:
                broken = True
                break
            if packet.is_keyframe and not begun:
                begun, since = True, packet.pts if since is None else since
            if skips and packet.size and skipping != (packet.pts not in needed):
                skipping = packet.pts not in needed
                codec.skip_frame = "NONREF" if skipping else "DEFAULT"
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if packet.pts is not None and (not begun or _before(packet.pts, since)):
                    if faults is not None:
                        faults.append(error)
                    continue
                broken = True
                break
            for frame in frames:
                if not frame.is_corrupt:
                    yield frame
                elif begun and not _before(frame.pts, since):
                    raise _BrokenError
    except av.FFmpegError:
        broken = True
    if broken:
        with contextlib.suppress(av.FFmpegError):
            for frame in stream.decode(None):  # what the decoder still holds
                if frame.is_corrupt or not (limit is None or _before(frame.pts, limit)):
                    break
                yield frame
        raise _BrokenError


def _before(time: int | None, other: int | None) -> bool:
    """Whether a time lies before another; not known of a packet or frame without one."""
    return time is not None and other is not None and time < other


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """The frame in RGB, uint8 (H, W, 3), upright."""
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return pixels
    except ValueError:  # another side datum is of a kind that PyAV does not know
        return np.rot90(pixels, round(frame.rotation / 90))
    across, down = matrix[[0, 4]]  # a pixel (x, y) is shown at (m0 x + m3 y, m1 x + m4 y)
    if abs(int(matrix[1])) > abs(int(matrix[0])):
        pixels = pixels.transpose(1, 0, 2)
        across, down = matrix[[3, 1]]
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
