"""Text of annotation files: compressed or not, in UTF-8, UTF-16 or UTF-32, within bounds of size.

What a file is, is judged by its first bytes and not by its name.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa

BLOCK = 1 << 20  #: bytes that are read at once
MAX_RATIO, RATIO_SLACK = 100, 2 << 20  #: a file may unpack to MAX_RATIO times its size plus RATIO_SLACK bytes

#: First bytes of compressed files, with the name that pyarrow uses.
CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

#: First bytes of files that are not annotations, with what they are and the fix.
FOREIGN = {
    b"version https://git-lfs.github.com/spec": "is a git-lfs pointer, not the file itself; run `git lfs pull`",
    b"PK\3\4": "is a zip archive; unpack it and name the file in it",
    b"BZh": "is a bzip2 file; unpack it with bunzip2, or compress it with gzip",
    b"\xfd7zXZ\0": "is an xz file; unpack it with unxz, or compress it with gzip",
    b"7z\xbc\xaf": "is a 7z archive; unpack it and name the file in it",
    b"Rar!": "is a RAR archive; unpack it and name the file in it",
    b"ARROW1\0\0": "is an Arrow file; write it as parquet",
    b"\x04\x22\x4d\x18": "is an LZ4 file; unpack it with lz4 -d, or compress it with gzip",
    b"SQLite format 3": "is an SQLite database; export its rows as JSON lines",
    b"\x93NUMPY": "is a NumPy array; write its samples as JSON lines",
    b"\x89PNG": "is an image; name the annotation file",
    b"%PDF": "is a PDF document; name the annotation file",
    b"<?xml": "is XML, perhaps the error message of a server; fetch the file again",
}
_HTML = (b"<!doctype", b"<html")

#: Byte order marks, longer ones first: that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
#: Encodings without a mark, by which of the first 4 bytes are zero: JSON begins with an ASCII character.
_ZEROS = {
    "x000": "utf-32-le",
    "000x": "utf-32-be",
    "x0x0": "utf-16-le",
    "0x0x": "utf-16-be",
    "x0xx": "utf-16-le",
    "0xxx": "utf-16-be",
}


class AnnotationFileError(ValueError):
    """An annotation file that cannot be read, or not to its end: one line with the file and the fix."""


def max_unpacked(size: int) -> int:
    """Return the bytes that an annotation file of ``size`` bytes may unpack to."""
    return MAX_RATIO * size + RATIO_SLACK


def foreign_kind(head: bytes) -> str:
    """Return what a file with these first bytes is, and the fix; empty if it may contain annotations."""
    if head.lstrip().lower().startswith(_HTML):
        return "is an HTML page; its address may need a login or lead to a page about the file"
    return next((text for magic, text in FOREIGN.items() if head.startswith(magic)), "")


def text_blocks(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks, without white space and a byte order mark before it; none if it is empty.

    The text may contain lone surrogates: those of UTF-16, and as the surrogates of ``surrogateescape`` the bytes that
    are not valid UTF-8.

    Raises:
        AnnotationFileError: the file is something else, or unpacks to more than :func:`max_unpacked`.
        OSError: it cannot be read, or its compressed data are damaged.
    """
    blocks = _unpack(path)
    head = next(blocks, b"")
    if foreign := foreign_kind(head):
        raise AnnotationFileError(f"{path}: {foreign}")
    mark, encoding = _detect_encoding(head)
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    is_empty = True
    try:
        for block in chain([head.removeprefix(mark)], blocks):
            text = decoder.decode(block)
            text = text.lstrip() if is_empty else text
            if text:
                is_empty = False
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
    except UnicodeDecodeError as error:
        message = f"begins as {encoding.upper()} but is not ({error.reason}); write it as UTF-8, or fetch it again"
        raise AnnotationFileError(f"{path}: {message}") from None


def _unpack(path: Path) -> Iterator[bytes]:
    """Yield the unpacked bytes of a file in blocks."""
    with open(path, "rb") as raw:
        magic = raw.read(4)
        size = raw.seek(0, io.SEEK_END)
    codec = next((name for start, name in CODECS.items() if magic.startswith(start)), None)
    total = 0
    with io.BufferedReader(pa.input_stream(str(path), compression=codec), BLOCK) as stream:
        while block := stream.read(BLOCK):
            if codec and not total and block.startswith(tuple(CODECS)):
                raise AnnotationFileError(f"{path}: is compressed twice; unpack it once")
            total += len(block)
            if codec and total > max_unpacked(size):
                message = f"unpacks to over {max_unpacked(size):,} bytes, {MAX_RATIO} times its size; unpack it by hand"
                raise AnnotationFileError(f"{path}: {message}")
            yield block


def _detect_encoding(head: bytes) -> tuple[bytes, str]:
    """Return the byte order mark of a text, which may be missing, and its encoding."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return mark, encoding
    return b"", _ZEROS.get("".join("0" if byte == 0 else "x" for byte in head[:4]), "utf-8")
