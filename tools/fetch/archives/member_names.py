"""Names of archive members as old programs wrote them, and the spellings under which they are found.

A path is the name of a member in UTF-8. Bytes that are not UTF-8 are surrogates, as in Python's file names. Its plain
path is what an annotation file would call it: slashes for the backslashes of old Windows programs, and composed letters
(NFC) for the decomposed ones of macOS. A path with a drive letter has no plain path: it leads out of the archive.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

#: Encodings of names without a mark that says so: DOS and Windows in the West, China, Japan, Taiwan, Korea, Russia.
ENCODINGS = ("cp437", "cp850", "cp1252", "gb18030", "cp932", "big5", "cp949", "cp866", "cp1251")

_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


def normalize_path(name: str) -> str | None:
    """Return a member's name as a path relative to the archive; None if it is empty or contains ``..`` or NUL."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts or "\0" in name else "/".join(parts)


def plain_path(path: str) -> str | None:
    """Return the plain path of a normalized path; None if that leads out of the archive."""
    if path.isascii() and "\\" not in path and path[1:2] != ":":
        return path
    return None if _DRIVE.match(path) else normalize_path(unicodedata.normalize("NFC", path.replace("\\", "/")))


def other_spellings(path: str) -> Iterator[str]:
    """Yield the other paths that a member called ``path`` may have, without repetition."""
    plain = plain_path(path)
    if plain is None:
        return
    seen = {path}
    candidates: list[str | None] = [plain]
    if not plain.isascii():
        for encoding in ENCODINGS:
            try:
                spelled = plain.encode(encoding).decode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                continue
            candidates += [spelled, plain_path(spelled)]
    for candidate in candidates:
        if candidate is not None and candidate not in seen:
            seen.add(candidate)
            yield candidate
