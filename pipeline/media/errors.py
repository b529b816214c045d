"""Errors of media files, and what can be told about a file before any decoder sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

REASONS = (
    "missing_file",
    "empty_file",
    "outside_root",
    "not_media",
    "no_video_stream",
    "corrupt",
    "truncated",
    "bad_clip",
    "unsupported",
    "timeout",
    "too_few_frames",
)

#: Larger pictures are refused: a few bytes can promise gigabytes of pixels. The same bound as Pillow's warning.
MAX_PIXELS = 89_478_485

#: First bytes of containers; a file that starts so is a damaged video rather than something else.
_CONTAINERS = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV\x01", b"OggS", b"GIF8", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


class MediaError(Exception):
    """One media item cannot be used: ``reason`` is one of :data:`REASONS`, the text is one clear line."""

    def __init__(self, reason: str, path: str | Path, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not one of {', '.join(REASONS)}")
        super().__init__(f"{path}: {' '.join(message.split())}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return _rebuild, (self.reason, str(self))


def _rebuild(reason: str, line: str) -> MediaError:
    """A MediaError that has crossed a process boundary."""
    error = MediaError(reason, "", "")
    error.args = (line,)
    return error


def check_file(path: str | Path) -> Path:
    """``path``, if it is a file with something in it.

    Raises:
        MediaError: missing_file, empty_file, or not_media for a folder.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError("missing_file", path, f"cannot be opened ({text})") from None
    if path.is_dir():
        raise MediaError("not_media", path, "is a folder; folders of frames need the reader img")
    if not path.is_file():
        raise MediaError("not_media", path, "is not a regular file")
    if size == 0:
        raise MediaError("empty_file", path, "has no bytes")
    return path


def diagnose_open_error(path: Path) -> MediaError:
    """Why a file that no decoder could open is broken, judged from its bytes: not_media, truncated or corrupt."""
    with open(path, "rb") as file:
        head = file.read(16)
        if head[4:8] in _BOXES:
            if not _has_index(file):
                return MediaError("truncated", path, "the MP4 ends before its index (moov); fetch the file again")
            return MediaError("corrupt", path, "the MP4's index (moov) cannot be read; fetch the file again")
    if head.startswith(_CONTAINERS):
        return MediaError("corrupt", path, "starts like a video but cannot be opened; fetch the file again")
    kind = "an HTML page" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else "no known video format"
    return MediaError("not_media", path, f"is {kind}, whatever its name says")


def is_truncated(path: Path) -> bool:
    """Whether an MP4, Matroska or AVI file is shorter than its own structure says; False where it does not say."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(64)
        if head[4:8] in _BOXES:
            return any(end > size and kind in (b"mdat", b"moov", b"moof") for kind, end in _boxes(file))
        if head.startswith(b"RIFF"):  # the first of several where the file is large
            return 8 + int.from_bytes(head[4:8], "little") > size
        if head.startswith(b"\x1aE\xdf\xa3"):
            return _segment_end(head) > size
    return False


def _has_index(file: BinaryIO) -> bool:
    """Whether a whole moov box stands among the top-level boxes of an MP4."""
    size = file.seek(0, 2)
    return any(kind == b"moov" and end <= size for kind, end in _boxes(file))


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Type and end of the top-level boxes of an MP4 (ISO/IEC 14496-12, section 4.2), to the first that is cut."""
    total = file.seek(0, 2)
    place = 0
    while place + 8 <= total:
        file.seek(place)
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(file.read(8), "big")
        elif size == 0:  # up to the end of the file
            size = total - place
        if size < 8:
            return
        place += size
        yield kind, place


def _segment_end(head: bytes) -> int:
    """Where the Segment of a Matroska file ends, of its first bytes (RFC 8794, section 6.2); 0 if it does not say."""
    place, size = _element_size(head, 4)
    place += size  # past the EBML header
    if head[place : place + 4] != b"\x18S\x80g":
        return 0
    place, size = _element_size(head, place + 4)
    return place + size if size else 0


def _element_size(data: bytes, place: int) -> tuple[int, int]:
    """The end of a size field at ``place``, and the size; 0 where it is not known."""
    length = 9 - data[place].bit_length() if place < len(data) and data[place] else 1
    value = int.from_bytes(data[place : place + length], "big") & (1 << 7 * length) - 1
    return place + length, 0 if value == (1 << 7 * length) - 1 else value
