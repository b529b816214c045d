"""Read a remote file at any offset by ranged requests, through a small cache of blocks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.response import NO_RANGES, RemoteFileInfo

BLOCK = 64 << 10  #: bytes; requests begin and end at multiples of it
READ_AHEAD = 4 << 20  #: bytes, at most, that a sequential read requests beyond its end
CACHED = 8 << 20  #: bytes of blocks in the cache


class HttpFile:
    """A :class:`~framestream.tools.fetch.base.RandomAccessFile` on a web server, the hub or a bucket.

    Adjacent missing blocks are fetched in one request. A read that starts where the last one ended doubles what is read
    ahead, up to ``READ_AHEAD``. A read of more than half of ``CACHED`` bypasses the cache. Threads may share the file.

    Args:
        url: returns the URL of the file. It is called for each request, because signed URLs expire.
        name: for error messages.
        size: bytes of the file. Every response must agree.
        identity: see :class:`~framestream.tools.fetch.base.RandomAccessFile`.
    """

    def __init__(self, http: HttpClient, url: Callable[[], str], name: str, size: int, identity: str) -> None:
        self.name, self.size, self.identity = name, size, identity
        self._http, self._url = http, url
        self._info: RemoteFileInfo | None = None  # of the last response
        self._blocks: OrderedDict[int, bytes] = OrderedDict()  # by number, least recently used first
        self._next, self._ahead = -1, 0  # end of the last read, and the bytes read ahead
        # Guards the three attributes above. It is not held during a request, so threads wait for no other's request.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, http: HttpClient, url: str, name: str) -> HttpFile:
        """Return the file at ``url``. One request reads its size.

        Raises:
            FetchError: missing_file, unsupported if the server cannot send parts of a file, unreachable, denied.
        """
        info = http.probe(url, name)
        if info is None:
            raise FetchError("missing_file", name, "the server has no such file")
        if info.size == UNKNOWN or (info.size and not info.ranges):
            raise FetchError("unsupported", name, NO_RANGES)
        return cls(http, lambda: url, name, info.size, info.identity)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``, fewer only at the end of the file."""
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        with self._lock:
            self._ahead = ahead = min(max(2 * self._ahead, BLOCK), READ_AHEAD) if offset == self._next else 0
            self._next = end
        if end - offset > CACHED // 2:
            return self._request(offset, end)
        data, position = bytearray(), offset
        for number in range(offset // BLOCK, (end - 1) // BLOCK + 1):
            with self._lock:
                block = self._blocks.get(number)
                if block is not None:
                    self._blocks.move_to_end(number)
            if block is None:
                block = self._load(number, end, ahead)
            start = number * BLOCK
            data += block[position - start : end - start]
            position = start + BLOCK
        return bytes(data)

    def _load(self, first: int, end: int, ahead: int) -> bytes:
        """Fetch block ``first`` and the missing blocks after it, up to byte ``end + ahead``. Return block ``first``."""
        last = min(end + ahead, self.size)
        stop = first + 1
        with self._lock:
            while stop * BLOCK < last and stop not in self._blocks:
                stop += 1
        data = self._request(first * BLOCK, min(stop * BLOCK, self.size))
        with self._lock:
            for number in reversed(range(first, stop)):  # the first block becomes the most recently used one
                start = (number - first) * BLOCK
                self._blocks[number] = data[start : start + BLOCK]
                self._blocks.move_to_end(number)
            while len(self._blocks) > CACHED // BLOCK:
                self._blocks.popitem(last=False)
        return data[:BLOCK]

    def _request(self, offset: int, end: int) -> bytes:
        data, info = self._http.read(self._url(), self.name, offset, end - offset, self._info)
        if info.size not in (UNKNOWN, self.size):
            raise FetchError("bad_checksum", self.name, f"the size has changed from {self.size} to {info.size} bytes")
        self._info = info
        return data
