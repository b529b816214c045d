"""Name what a file is that no decoder opens, from its first bytes, and the step that helps."""

from __future__ import annotations

import re
from pathlib import Path

from framestream.pipeline.media.errors import MP4_BOXES, MediaError, has_mp4_index

_HEAD = 4096  #: bytes that are looked at
_UNPACK = "is {}; decompress it first"
_ARCHIVE = "is {}; unpack it, or list it as an archive in the root map"
_CONVERT = "is {}, which is not read; convert it to JPEG or PNG"
_IMAGE = "is {}; give it as an image, not as a video"
_VIDEO = "is {}; give it as a video, not as an image"
_SOUND = "is {}, which has no video"
_LIST = "is {}, which lists a stream's address; fetch the video itself (ffmpeg -i ADDRESS -c copy video.mp4, or yt-dlp)"
_PIECE = "is {} without its initialization part; join both (cat init.mp4 segment.m4s > video.mp4)"
_TEXT = "is {}, whatever its name says; fetch the file from its real address"
#: (offset, bytes, text, what it is); the first match counts.
_SIGNATURES = (
    (0, b"version https://git-lfs.github.com/", "is {}, not the file itself; run: git lfs pull", "a Git LFS pointer"),
    (0, b"/annex/objects/", "is {}, not the file itself; run: git annex get", "a git-annex pointer"),
    (0, b"# xet version", "is {}, not the file itself; download it with a client for Xet", "a Xet pointer"),
    (0, b"\x00\x05\x16\x07", "is {}, not the file itself; delete it", "metadata of macOS (AppleDouble)"),
    (0, b"#EXTM3U", _LIST, "an HLS playlist"),
    (0, b"\x1f\x8b", _UNPACK, "gzip data"),
    (0, b"BZh", _UNPACK, "bzip2 data"),
    (0, b"\xfd7zXZ\x00", _UNPACK, "xz data"),
    (0, b"\x28\xb5\x2f\xfd", _UNPACK, "zstd data"),
    (0, b"PK\x03\x04", _ARCHIVE, "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", _ARCHIVE, "a 7z archive"),
    (0, b"Rar!", _ARCHIVE, "a RAR archive"),
    (257, b"ustar", _ARCHIVE, "a tar archive"),
    (0, b"PAR1", _TEXT, "a Parquet file"),
    (0, b"%PDF", _CONVERT, "a PDF document"),
    (0, b"%!PS", _CONVERT, "a PostScript document"),
    (0, b"8BPS", _CONVERT, "a Photoshop document"),
    (0, b"\x00\x00\x00\x0cJXL ", _CONVERT, "a JPEG XL image"),
    (0, b"\xff\x0a", _CONVERT, "a JPEG XL image"),
    (0, b"\x00\x00\x00\x0cjP  ", _CONVERT, "a JPEG 2000 image"),
    (0, b"\x93NUMPY", _CONVERT, "a NumPy array"),
    (0, b"\x89HDF", _CONVERT, "an HDF5 file"),
    (0, b"\xff\xd8\xff", _IMAGE, "a JPEG image"),
    (0, b"\x89PNG\r\n\x1a\n", _IMAGE, "a PNG image"),
    (0, b"GIF8", _IMAGE, "a GIF"),
    (8, b"WEBP", _IMAGE, "a WebP image"),
    (0, b"BM", _IMAGE, "a BMP image"),
    (0, b"II*\x00", _IMAGE, "a TIFF image"),
    (0, b"MM\x00*", _IMAGE, "a TIFF image"),
    (8, b"WAVE", _SOUND, "a WAV sound file"),
    (0, b"ID3", _SOUND, "an MP3 sound file"),
    (0, b"fLaC", _SOUND, "a FLAC sound file"),
)
_ANIMATED = 0x02  #: flag of the extended header of a WebP file
#: What a copy without links leaves of one, such as of a hub cache or of git-annex.
_LINK = re.compile(rb"(\.\./)+[^\0-\x1f]{1,1000}\n?")
_PIECES = (b"styp", b"sidx", b"moof", b"emsg", b"prft")  #: first boxes of a segment of a stream
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_VIDEOS = ((b"\x1aE\xdf\xa3", "a Matroska or WebM video"), (b"FLV\x01", "an FLV video"), (b"OggS", "an Ogg file"))
#: First bytes of containers; a file that starts with them is a damaged video rather than something else.
_CONTAINERS = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV\x01", b"OggS", b"GIF8", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75")


def diagnose_open_error(path: Path, reason: str = "not_media") -> MediaError:
    """Judge from its bytes why no decoder could open a file as a video; ``reason`` is that of other files."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            has_index = head[4:8] in MP4_BOXES and has_mp4_index(file)
    except OSError as error:
        return MediaError("missing_file", path, f"cannot be opened ({error.strerror})")
    named = _named(head)
    if named and named != _name_as_image(head) and not head.startswith((b"GIF8", b"RIFF")):
        return MediaError(reason, path, named)
    if head[4:8] in MP4_BOXES:
        if not has_index:
            return MediaError("truncated", path, "the MP4 ends before its index (moov); fetch the file again")
        return MediaError("corrupt", path, "the MP4 is damaged: its index (moov) cannot be read")
    if reason == "not_media" and head.startswith(_CONTAINERS):
        return MediaError("corrupt", path, "is damaged: it starts like a video but cannot be opened")
    if reason == "unsupported":
        return MediaError(reason, path, named or "is in a container format that is not read")
    return MediaError(reason, path, named or "is no known video format, whatever its name says")


def is_animated_webp(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of an animated WebP image."""
    return head[8:12] == b"WEBP" and head[12:16] == b"VP8X" and bool(head[20:21]) and bool(head[20] & _ANIMATED)


def name_of_other_file(data: bytes) -> str:
    """Say what bytes are that Pillow does not open as an image, and the step that helps."""
    head = data[:_HEAD]
    return _name_as_image(head) or _named(head) or "is not an image in a known format, whatever its name says"


def _name_as_image(head: bytes) -> str:
    """Name what an image can be mistaken for; empty for other files."""
    if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis", *_HEIC):
        return _VIDEO.format("an MP4 video")
    for start, name in _VIDEOS:
        if head.startswith(start):
            return _VIDEO.format(name)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return _VIDEO.format("an AVI video")
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")):
        return "is an image of a kind that is not read, or damaged; convert it to an 8-bit PNG"
    return ""


def _named(head: bytes) -> str:
    """Name a file that is neither a video nor an image of a known format; empty if it is unknown."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return _CONVERT.format("a HEIC photo")
    if head[4:8] in _PIECES:
        return _PIECE.format("a segment of a DASH or HLS stream")
    if head.startswith(b"\x1fC\xb6u"):
        return _PIECE.format("a segment of a WebM stream")
    if is_animated_webp(head):
        return "is an animated WebP image, which is read as a video only with data.decoder: auto or ffmpeg"
    for offset, start, text, name in _SIGNATURES:
        if head.startswith(start, offset):
            return text.format(name)
    if not head.strip(b"\0"):
        return "has only zero bytes; fetch the file again"
    return _named_text(head)


def _named_text(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<mpd" in text:
        return _LIST.format("a DASH manifest")
    if b"<smoothstreamingmedia" in text:
        return _LIST.format("a Smooth Streaming manifest")
    if b"<svg" in text:
        return _CONVERT.format("an SVG drawing")
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<script")) or b"<html" in text[:1024]:
        return _TEXT.format("an HTML page")
    if text.startswith(b"<"):
        return _TEXT.format("an XML document")
    if text.startswith((b"{", b"[")):
        return _TEXT.format("JSON text")
    if _LINK.fullmatch(head):
        return "is the target of a link as text, not the file itself; copy the folder again with its links (rsync -a)"
    return ""
