"""Read a file that was cut into parts as one file."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from framestream.tools.fetch.base import RandomAccessFile


class MultipartFile:
    """A :class:`~framestream.tools.fetch.base.RandomAccessFile` of parts in the given order."""

    def __init__(self, parts: Sequence[RandomAccessFile]) -> None:
        if not parts:
            raise ValueError("no parts to join")
        self.parts = tuple(parts)
        self.starts = [0, *accumulate(part.size for part in parts)]  #: offset of each part in the joined file
        self.size = self.starts.pop()
        self.name = f"{parts[0].name} to {parts[-1].name}" if len(parts) > 1 else parts[0].name
        identities = json.dumps([[part.name, part.size, part.identity] for part in parts])
        self.identity = hashlib.sha256(identities.encode()).hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``, across part boundaries; fewer only at the end of the file."""
        pieces, end = [], min(offset + size, self.size)
        while offset < end:
            number = bisect_right(self.starts, offset) - 1
            part, start = self.parts[number], self.starts[number]
            piece = part.read(offset - start, min(end, start + part.size) - offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
