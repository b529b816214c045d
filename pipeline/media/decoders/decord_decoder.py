"""decord (the package decord2) as a decoder: frames as the published code reads them, where these are right.

decord numbers frames by sorting the times of packets. It seeks as if every key frame stood at its number in the file.
It gives no times with its frames, so a wrong one cannot be noticed later. Files are therefore checked first:

* Times, count and key frames must be those that PyAV reads from the packets. In open groups of pictures, and in MPEG-4
  video with B-frames, frames stored after a key frame are shown before it. Its number then differs from its position.
* Transport and program streams are refused: seeking there goes by decoding times, and decord seeks by others.
* The first frame, and each key frame that is sought, must be the one that PyAV decodes.

Frames are read one after another from a key frame on. decord's own skipping gives up after a number of polls on a busy
machine, and then returns other frames without an error. In ASF and in fragmented MP4 its seeks lead elsewhere, so that
reading starts at the first frame in all formats but those of :data:`SEEKING`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from framestream.pipeline.media.decoders.base import PredictFn
from framestream.pipeline.media.errors import DecoderError, MediaError, check_file, has_mp4_fragments
from framestream.pipeline.media.video import (
    BY_DECODING_TIME,
    InexactSeekError,
    PacketScan,
    ResizeFn,
    VideoSource,
    make_source,
    open_video,
    scan_packets,
)
from framestream.pipeline.media.video_stream import (
    DamagedStreamError,
    decode_stream,
    frame_pixels,
    is_mirrored,
    open_stream,
)

TIME_ERROR = 1e-3  #: seconds by which times of decord, which are float32, may differ
PIXEL_ERROR = 8.0  #: mean difference of the first frame from PyAV's, in levels of 255, that rounding explains
#: Formats in which decord's seeks lead to the key frame, except in fragmented MP4.
SEEKING = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_FIX = "set data.decoder: auto"


def load_decord() -> Any:
    """Import decord.

    Raises:
        DecoderError: it is not installed, or does not load.
    """
    try:
        import decord
    except (ImportError, OSError) as error:
        text = " ".join(str(error).split())
        raise DecoderError(f"data.decoder: decord needs the package decord2 ({text}); pip install decord2") from None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


class DecordDecoder:
    """Reads with ``decord.VideoReader`` on one thread."""

    def open(self, path: Path, resize: ResizeFn) -> VideoSource:
        decord, path = load_decord(), check_file(path)
        scan = scan_packets(path)
        if reason := _unreadable(scan):
            raise _refused(path, reason)
        first, turn = _first_frame(path)
        if not turn:
            raise _refused(path, "decord does not mirror its frames, as the file says")
        reader = _open_reader(decord, path)
        if reason := _misread(reader, scan):
            raise _refused(path, reason)
        if not _is_same(_pixels(_next_frame(decord, reader, path, 0), first.shape[1]), first):
            raise _refused(path, "decord shows another first frame than PyAV")
        keys = np.searchsorted(scan.ticks, scan.keys) if _can_seek(path, scan) else np.zeros(1, np.int64)

        def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
            reader, position = _open_reader(decord, path), 0  # position: number of the frame that comes next
            starts = keys[np.searchsorted(keys, numbers, "right") - 1]
            sought = np.unique(starts[starts > np.append(0, numbers[:-1] + 1)])
            expected = open_video(path).decode_frames(sought) if len(sought) else iter(())
            for number, start in zip(numbers.tolist(), starts.tolist(), strict=True):
                if start > position:
                    reader.seek(start)
                for at in range(max(start, position), number + 1):
                    frame = _pixels(_next_frame(decord, reader, path, at), first.shape[1])
                    if at == start > position and not _is_same(frame, _next_key(expected)):
                        raise _refused(path, f"decord does not find key frame {at}")
                position = number + 1
                yield resize(frame)

        return make_source(scan, scan.ticks, decode_frames, damaged=False)

    def open_sequential(self, path: Path, resize: ResizeFn, predict: PredictFn, min_frames: int) -> VideoSource:
        return self.open(path, resize)


def _can_seek(path: Path, scan: PacketScan) -> bool:
    """Return whether decord's seeks lead to the key frames of a file."""
    return scan.seekable and scan.container in SEEKING and not has_mp4_fragments(path)


def _next_key(frames: Iterator[np.ndarray]) -> np.ndarray | None:
    """Return PyAV's next key frame; None if it does not decode."""
    try:
        return next(frames, None)
    except InexactSeekError:
        return None


def _is_same(frame: np.ndarray, expected: np.ndarray | None) -> bool:
    if expected is None or frame.shape != expected.shape:
        return False
    return float(np.abs(frame.astype(np.int16) - expected).mean()) <= PIXEL_ERROR


def _refused(path: Path, reason: str) -> MediaError:
    return MediaError("unsupported", path, f"{reason}; {_FIX}")


def _unreadable(scan: PacketScan) -> str:
    """Return why decord would not read all frames of a file rightly, as its packets show; empty if it would."""
    if scan.container in BY_DECODING_TIME:
        return "decord returns wrong frames of transport and program streams"
    if scan.damaged:
        return "it is damaged, and decord does not say which frames are"
    if not len(scan.keys) or not scan.timed:
        return "decord cannot number its frames, which have no times of their own"
    if scan.keys[0] != scan.ticks[0]:
        return "decord needs a key frame at the beginning"
    if scan.is_transparent:
        return "decord does not show transparent pixels as black"
    return ""


def _misread(reader: Any, scan: PacketScan) -> str:
    """Return how decord's numbers differ from those of the packets; empty if they do not."""
    if len(reader) != len(scan.ticks):
        return f"decord counts {len(reader)} frames, and there are {len(scan.ticks)}"
    seconds = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    expected = (scan.ticks - scan.ticks[0]) * float(scan.base)
    if not np.allclose(seconds - seconds[0], expected, rtol=1e-6, atol=TIME_ERROR):
        return "decord reads other times of its frames"
    if reader.get_key_indices() != np.searchsorted(scan.ticks, scan.keys).tolist():
        return "decord returns wrong frames where frames stored after a key frame are shown before it"
    return ""


def _open_reader(decord: Any, path: Path) -> Any:
    try:
        # fault_tol: frames that do not decode are errors, not copies of others
        return decord.VideoReader(str(path.absolute()), num_threads=1, fault_tol=0)
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise _refused(path, f"decord cannot open it ({_first_line(error)})") from None


def _next_frame(decord: Any, reader: Any, path: Path, number: int) -> np.ndarray:
    try:
        return reader.next().asnumpy()
    except StopIteration:
        raise _refused(path, f"decord ends before frame {number}") from None
    except (decord.DECORDError, RuntimeError) as error:
        raise _refused(path, f"decord stops at frame {number} ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    """Return what an error of decord says, without the place in its source that it comes from."""
    return str(error).strip().partition("\n")[0].rpartition(".cc:")[2][:200]


def _pixels(frame: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels of decord's array, uint8 (H, W, 3).

    Some processors need padded rows. Where the bytes of a row are a multiple of ``width`` pixels, decord calls the
    padding further channels, as of 32 pixels on a processor with AVX-512: (H, 32, 4) in place of (H, 32, 3).
    """
    if frame.ndim != 3 or frame.shape[1] != width or frame.shape[2] <= 3:
        return frame
    return frame.reshape(frame.shape[0], -1)[:, : 3 * width].reshape(frame.shape[0], width, 3)


def _first_frame(path: Path) -> tuple[np.ndarray, bool]:
    """Decode the first frame of a file with PyAV; return it and whether it is turned at most, not mirrored."""
    try:
        with open_stream(path, strict=True) as (container, stream):
            for frame in decode_stream(container, stream):
                return frame_pixels(frame), not is_mirrored(frame)
    except DamagedStreamError:
        pass
    raise MediaError("corrupt", path, f"its first frame does not decode; {_FIX}")
