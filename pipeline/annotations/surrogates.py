"""Replace lone UTF-16 surrogates in JSON text by U+FFFF: JSON can write them, but UTF-8 cannot store them."""

from __future__ import annotations

import re
from typing import BinaryIO

REPLACEMENT = (
    "\uffff"  #: stands for a lone surrogate; Unicode reserves it as a noncharacter, so no real text contains it
)

_LONGEST = 12  #: bytes of the longest escape, a pair
# Every escape is matched, so that a backslash that is itself escaped does not begin one. The alternatives, in order:
# a complete pair (high surrogate D800-DBFF, then low surrogate DC00-DFFF), a lone surrogate (group 1), any other escape
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class SurrogateFilter:
    """File-like view of ``head`` and the rest of ``file`` in which every escape of a lone surrogate is ``\\uffff``."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head, self._file = head, file

    def read(self, size: int = -1) -> bytes:
        """Return about ``size`` bytes that do not end within an escape; empty at the end of the file."""
        if not size:
            return b""
        text, self._head = self._head or self._file.read(size), b""
        if b"\\" in text[-_LONGEST:]:
            longer = bytearray(text)
            while b"\\" in longer[-_LONGEST:] and (more := self._file.read(64)):
                longer += more
            text = bytes(longer)
        if b"\\ud" in text or b"\\uD" in text:
            text = _ESCAPE.sub(lambda match: rb"\uffff" if match[1] else match[0], text)
        return text
