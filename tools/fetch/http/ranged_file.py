"""A remote file read at any place by ranged requests, through a small cache of blocks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.response import RemoteFileInfo

BLOCK = 64 << 10  #: bytes; requests begin and end at multiples of it
READ_AHEAD = 4 << 20  #: most bytes asked for beyond what is read, when reading goes on where it ended
CACHED = 8 << 20  #: bytes of blocks kept


class HttpFile:
    """A file of a web server, the hub or a bucket, for reading archives (see ``framestream.tools.fetch.base.Bytes``).

    Neighbouring blocks that are missing come in one request. Reading forwards doubles what is asked for, up to
    ``READ_AHEAD``; a read of more than half of ``CACHED`` goes past the cache. Threads may share it.

    Args:
        url: gives the address, which may be a signed one that does not last.
        size: bytes of the file; every answer must agree.
    """

    def __init__(self, http: HttpClient, url: Callable[[], str], name: str, size: int, identity: str) -> None:
        self.name, self.size, self.identity = name, size, identity
        self._http, self._url = http, url
        self._known: RemoteFileInfo | None = None
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._next, self._ahead = -1, 0
        self._lock = threading.Lock()  # on the three above; not held while bytes are under way

    @classmethod
    def open(cls, http: HttpClient, url: str, name: str) -> HttpFile:
        """The file at ``url``, asked for its size.

        Raises:
            FetchError: missing_file, unsupported for a server that cannot send parts, unreachable, denied.
        """
        facts = http.probe(url, name)
        if facts is None:
            raise FetchError("missing_file", name, "the server has no such file")
        if facts.size == UNKNOWN or (facts.size and not facts.ranges):
            raise FetchError("unsupported", name, "the server cannot send parts of a file; fetch it and map dir:PATH")
        return cls(http, lambda: url, name, facts.size, facts.identity)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        with self._lock:
            self._ahead = ahead = min(max(2 * self._ahead, BLOCK), READ_AHEAD) if offset == self._next else 0
            self._next = end
        if end - offset > CACHED // 2:
            return self._ask(offset, end)
        data, place = bytearray(), offset
        for number in range(offset // BLOCK, (end - 1) // BLOCK + 1):
            with self._lock:
                block = self._blocks.get(number)
                if block is not None:
                    self._blocks.move_to_end(number)
            if block is None:
                block = self._load(number, end, ahead)
            start = number * BLOCK
            data += block[place - start : end - start]
            place = start + BLOCK
        return bytes(data)

    def _load(self, first: int, end: int, ahead: int) -> bytes:
        """Fetch block ``first`` and those after it that are missing, up to byte ``end`` and what is read ahead."""
        last = min(end + ahead, self.size)
        stop = first + 1
        with self._lock:
            while stop * BLOCK < last and stop not in self._blocks:
                stop += 1
        data = self._ask(first * BLOCK, min(stop * BLOCK, self.size))
        with self._lock:
            for number in reversed(range(first, stop)):
                start = (number - first) * BLOCK
                self._blocks[number] = data[start : start + BLOCK]
                self._blocks.move_to_end(number)
            while len(self._blocks) > CACHED // BLOCK:
                self._blocks.popitem(last=False)
        return data[:BLOCK]

    def _ask(self, offset: int, end: int) -> bytes:
        data, facts = self._http.read(self._url(), self.name, offset, end - offset, self._known)
        if facts.size not in (UNKNOWN, self.size):
            raise FetchError("bad_checksum", self.name, f"has {facts.size} bytes and not {self.size} any more")
        self._known = facts
        return data
