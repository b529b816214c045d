"""Ranges that are requested at once and received later, over connections that are open already.

Nothing waits when a request is sent, so one thread can have many under way. A response in the usual form is read
without :mod:`http.client`, which takes a small part of its processor time (docs/performance.md). Every other response
is left to that client with all bytes that have arrived.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from functools import lru_cache
from urllib.parse import urlsplit, urlunsplit

from framestream.pipeline.storage.connections import Deadline
from framestream.pipeline.storage.http import (
    REDIRECTING,
    Address,
    RangeClient,
    RangeResponse,
    TransientReadError,
    connection_error,
    read_range,
)

MAX_HEAD = 8192  #: bytes of a response's head that is read here
USUAL = re.compile(rb"HTTP/1\.1 206 [^\r\n]*\r\n")
RANGE = re.compile(rb"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


class RangeSender:
    """Sends ranges over idle connections of a client, at most ``limit`` at a time; threads share it."""

    def __init__(self, client: RangeClient, limit: int) -> None:
        self.client = client
        self._limit, self._under_way, self._lock = limit, 0, threading.Lock()

    def send(self, address: Address, offset: int, size: int, deadline: Deadline) -> SentRange | None:
        """Request ``size`` bytes of a file from ``offset``; None if no open connection can be used for it now."""
        target, headers, _ = self.client.target(address)
        head = _request_head(target, tuple(headers.items()))
        if head is None or not self._begin():
            return None
        request = head + b"Range: bytes=%d-%d\r\n\r\n" % (offset, offset + size - 1)
        while connection := self.client.connections.take_idle(target):
            try:
                connection.sock.settimeout(deadline.idle_timeout())
                connection.sock.sendall(request)
            except (OSError, AttributeError):  # most likely closed by the server while it was idle
                connection.close()
                continue
            return SentRange(self, address, target, connection, offset, size)
        self.end()
        return None

    def end(self) -> None:
        """Count a range as answered or given up."""
        with self._lock:
            self._under_way -= 1

    def _begin(self) -> bool:
        with self._lock:
            is_free = self._under_way < self._limit
            self._under_way += is_free
        return is_free


class SentRange:
    """A range that was requested. :meth:`receive` or :meth:`close` has to be called once."""

    def __init__(
        self,
        sender: RangeSender,
        address: Address,
        target: str,
        connection: http.client.HTTPConnection,
        offset: int,
        size: int,
    ) -> None:
        self._sender, self._address, self._target = sender, address, target
        self._connection, self._offset, self._size = connection, offset, size

    def close(self) -> None:
        """Give the range up."""
        self._connection.close()
        self._sender.end()

    def receive(self, deadline: Deadline) -> RangeResponse | None:
        """Return the range; None if it has to be requested again, which does not count as a failed try.

        That is so if the server has closed the connection before it answered, and for redirects.

        Raises:
            TransientReadError, OSError, ValueError: as one try of :meth:`RangeClient.fetch`.
        """
        is_kept = False
        try:
            with deadline.track(self._connection):
                found, is_kept = self._receive(self._connection.sock, deadline)
            return found
        except (OSError, http.client.HTTPException) as error:
            raise connection_error(error, self._address, deadline) from None
        finally:
            if is_kept:
                self._sender.client.connections.give_back(self._target, self._connection)
            else:
                self._connection.close()
            self._sender.end()

    def _receive(self, sock: socket.socket, deadline: Deadline) -> tuple[RangeResponse | None, bool]:
        """Return the range, or None, and whether the connection can be used again."""
        buffer = bytearray(MAX_HEAD + self._size)
        view, filled, end = memoryview(buffer), 0, -1
        while end < 0 and filled < MAX_HEAD:
            try:
                sock.settimeout(deadline.idle_timeout())
                count = sock.recv_into(view[filled:])
            except ConnectionError:
                count = 0
            if not count:
                if filled:
                    break  # http.client says what is wrong
                return None, False
            end = buffer.find(b"\r\n\r\n", max(filled - 3, 0), filled + count)
            filled += count
        total, identity = self._usual(bytes(buffer[: end + 4])) if 0 <= end <= MAX_HEAD - 4 else (-1, "")
        body = end + 4
        last = body + self._size
        if total < 0 or filled > last:
            return self._unusual(sock, bytes(buffer[:filled]), deadline), False
        while filled < last:
            sock.settimeout(deadline.idle_timeout())
            count = sock.recv_into(view[filled:last])
            if not count:
                message = f"the server sent {filled - body} of {self._size} bytes"
                raise TransientReadError(ConnectionError, message)
            filled += count
        return RangeResponse(view[body:last], total, identity), True

    def _usual(self, head: bytes) -> tuple[int, str]:
        """Return size and identity of the file by a response in the usual form; -1 for another one."""
        status = USUAL.match(head)
        fields = _fields(head[status.end() :].split(b"\r\n")) if status else None
        if fields is None or not fields.keys().isdisjoint((b"transfer-encoding", b"content-encoding")):
            return -1, ""
        if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
            return -1, ""
        found = RANGE.fullmatch(fields.get(b"content-range", b""))
        if not found or fields.get(b"content-length") != b"%d" % self._size:
            return -1, ""
        first, last, total = map(int, found.groups())
        if (first, last) != (self._offset, self._offset + self._size - 1) or last >= total:
            return -1, ""
        return total, (fields.get(b"etag") or fields.get(b"last-modified") or b"").decode("latin-1")

    def _unusual(self, sock: socket.socket, received: bytes, deadline: Deadline) -> RangeResponse | None:
        """Let :mod:`http.client` read a response that began with ``received``."""
        with http.client.HTTPResponse(_Replayed(received, sock, deadline), method="GET") as response:
            response.begin()
            if response.status in REDIRECTING and "location" in response.headers:
                return None
            if self._target != self._address.url and response.status not in (206, 416):
                self._sender.client.forget_redirect(self._address)
                return None
            return read_range(self._address, response, self._offset, self._size)


class _Replayed(socket.socket):
    """A socket for :class:`http.client.HTTPResponse`, which has received some bytes before."""

    def __init__(self, received: bytes, sock: socket.socket, deadline: Deadline) -> None:
        self._raw = _ReplayedBytes(received, sock, deadline)

    def makefile(self, mode: str = "rb", **_: object) -> io.BufferedReader:  # type: ignore[override]
        return io.BufferedReader(self._raw)


class _ReplayedBytes(io.RawIOBase):
    """Bytes that were received, then those of a socket, each before the deadline."""

    def __init__(self, received: bytes, sock: socket.socket, deadline: Deadline) -> None:
        self._received, self._sock, self._deadline = memoryview(received), sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._received:
            count = min(len(buffer), len(self._received))
            buffer[:count] = self._received[:count]
            self._received = self._received[count:]
            return count
        self._sock.settimeout(self._deadline.idle_timeout())
        return self._sock.recv_into(buffer)


def _fields(lines: Iterable[bytes]) -> Mapping[bytes, bytes] | None:
    """Return header fields by lower-case name; None if one is repeated, continued or has no name."""
    fields: dict[bytes, bytes] = {}
    for line in lines:
        if not line:
            continue
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or not name or name != name.strip() or b"\n" in line or b"\r" in line or name in fields:
            return None
        fields[name] = value.strip()
    return fields


@lru_cache(maxsize=4096)
def _request_head(url: str, headers: tuple[tuple[str, str], ...]) -> bytes | None:
    """Return a GET request without its range; None if it cannot be written as plain text."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port
        host = f"[{host}]" if ":" in host else host
        host += f":{port}" if port not in (None, {"http": 80, "https": 443}.get(parts.scheme)) else ""
        target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers), ""]
        if re.search(r"[\x00-\x20\x7f]", target + host) or any(re.search(r"[\r\n]", line) for line in lines):
            return None
        return "\r\n".join(lines).encode("ascii")
    except ValueError:  # an invalid port, or letters beyond ASCII: http.client says so
        return None
