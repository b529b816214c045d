"""Errors of media files, and checks of a file's structure without a decoder."""

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

#: Larger images are refused: a few bytes can promise gigabytes of pixels. The limit is that of Pillow's warning.
MAX_PIXELS = 89_478_485

MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


class MediaError(Exception):
    """One media item cannot be used: ``reason`` is one of :data:`REASONS`, the text is one clear line."""

    def __init__(self, reason: str, path: str | Path, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not one of {', '.join(REASONS)}")
        super().__init__(f"{path}: {' '.join(message.split())}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return _rebuild, (self.reason, str(self))


class DecoderError(Exception):
    """A decoder, or its device, cannot be used on this machine: one line that names the field and the fix."""


def _rebuild(reason: str, line: str) -> MediaError:
    """Make a MediaError again after pickling."""
    error = MediaError(reason, "", "")
    error.args = (line,)
    return error


def check_file(path: str | Path) -> Path:
    """Return ``path`` if it is a regular file that is not empty.

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


def is_truncated(path: Path) -> bool:
    """Return whether an MP4, Matroska or AVI file is shorter than its structure states; False if it states nothing."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(64)
        if head[4:8] in MP4_BOXES:
            return any(end > size and kind in (b"mdat", b"moov", b"moof") for kind, end in _boxes(file))
        if head.startswith(b"RIFF"):  # large files have several; this is the first
            return 8 + int.from_bytes(head[4:8], "little") > size
        if head.startswith(b"\x1aE\xdf\xa3"):
            return _segment_end(head) > size
    return False


def has_mp4_index(file: BinaryIO) -> bool:
    """Return whether the top-level boxes of an MP4 include a complete moov box."""
    size = file.seek(0, 2)
    return any(kind == b"moov" and end <= size for kind, end in _boxes(file))


def has_mp4_fragments(path: Path) -> bool:
    """Return whether a file is an MP4 in fragments: it has moof boxes."""
    with open(path, "rb") as file:
        return file.read(8)[4:] in MP4_BOXES and any(kind == b"moof" for kind, _ in _boxes(file))


def _boxes(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield type and end of an MP4's top-level boxes (ISO/IEC 14496-12, section 4.2), up to the first truncated one."""
    total = file.seek(0, 2)
    offset = 0
    while offset + 8 <= total:
        file.seek(offset)
        size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if size == 1:  # a 64-bit size follows
            size = int.from_bytes(file.read(8), "big")
        elif size == 0:  # up to the end of the file
            size = total - offset
        if size < 8:
            return
        offset += size
        yield kind, offset


def _segment_end(head: bytes) -> int:
    """Return the offset at which a Matroska file's Segment ends (RFC 8794, section 6.2), or 0 if it is not stated."""
    offset, size = _element_size(head, 4)
    offset += size  # skip the EBML header
    if head[offset : offset + 4] != b"\x18S\x80g":
        return 0
    offset, size = _element_size(head, offset + 4)
    return offset + size if size else 0


def _element_size(data: bytes, offset: int) -> tuple[int, int]:
    """Return the end of the size field at ``offset``, and the size; 0 if it is unknown."""
    # the leading zeros of the first byte give the length of the field, and 7 bits of each byte are the value
    length = 9 - data[offset].bit_length() if offset < len(data) and data[offset] else 1
    value = int.from_bytes(data[offset : offset + length], "big") & (1 << 7 * length) - 1
    return offset + length, 0 if value == (1 << 7 * length) - 1 else value  # all ones: unknown
