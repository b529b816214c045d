"""JSON text for strict parsers: half a UTF-16 pair, which JSON can write and nothing can store, becomes U+FFFF."""

from __future__ import annotations

import re
from typing import BinaryIO

REPLACEMENT = "\uffff"  #: stands for half a pair; Unicode reserves it, so that no real text holds it

_LONGEST = 12  #: bytes of the longest escape, a pair
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class SurrogateFilter:
    """A readable of ``head`` and the rest of ``file`` in which every escape of half a pair is ``\\uffff``."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head, self._file = head, file

    def read(self, size: int = -1) -> bytes:
        """About ``size`` bytes, never ending within an escape; empty at the end."""
        if not size:
            return b""
        text, self._head = self._head or self._file.read(size), b""
        if b"\\" in text[-_LONGEST:]:
            text = bytearray(text)
            while b"\\" in text[-_LONGEST:] and (more := self._file.read(64)):
                text += more
        if b"\\ud" in text or b"\\uD" in text:
            text = _ESCAPE.sub(lambda found: rb"\uffff" if found[1] else found[0], text)
        return bytes(text)
