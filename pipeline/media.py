"""Errors of media files, and what can be told about a file before any decoder sees it."""

from __future__ import annotations

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


def explain_unopened(path: Path) -> MediaError:
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


def _has_index(file: BinaryIO) -> bool:
    """Whether a whole moov box stands among the top-level boxes of an MP4 (ISO/IEC 14496-12, section 4.2)."""
    end = file.seek(0, 2)
    place = 0
    while place + 8 <= end:
        file.seek(place)
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(file.read(8), "big")
        elif size == 0:  # up to the end of the file
            size = end - place
        if size < 8 or place + size > end:
            return False
        if kind == b"moov":
            return True
        place += size
    return False
