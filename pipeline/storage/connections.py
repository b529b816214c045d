"""Connections that are kept open, and an end to every request, whatever the server does.

They are those of ``http.client``, because reading frames is thousands of small requests and it spends the least
processor time on each (docs/performance.md). The proxies are those of the environment.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

STALL = 0.25  #: share of the time limit for which a request may wait for a byte, so that others can follow it


class Deadline:
    """Time for one read, shared by its requests; when it is over, they end wherever they stand."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self._over = threading.Event()
        self._busy: set[http.client.HTTPConnection] = set()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than the time that is left."""
        self._over.wait(max(min(seconds, self.left), 0))

    def stall(self) -> float:
        """Seconds that a request may wait for a byte.

        Raises:
            TimeoutError: the time is over.
        """
        if self._over.is_set() or self.left <= 0:
            raise TimeoutError(self.late())
        return min(self.seconds * STALL, self.left)

    def late(self) -> str:
        """What to say when the time is over."""
        return f"took longer than loader.read_timeout ({self.seconds:g} s)"

    def end(self) -> None:
        """Break off what still runs; nothing else happens to a read that has ended."""
        self._over.set()
        for connection in list(self._busy):
            if (sock := connection.sock) is not None:
                with contextlib.suppress(OSError):  # gone already
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def on(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """A request runs on ``connection``."""
        self._busy.add(connection)
        try:
            yield
        finally:
            self._busy.discard(connection)


class ConnectionPool:
    """The connections of one process to all servers; threads share them."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], deque[http.client.HTTPConnection]] = {}

    @contextlib.contextmanager
    def get(self, url: str, headers: Mapping[str, str], ticket: Deadline) -> Iterator[http.client.HTTPResponse]:
        """The answer to GET, its body unread; a connection whose answer was read whole is kept.

        Raises:
            OSError, http.client.HTTPException: no answer.
        """
        parts = urlsplit(url)
        idle = self._idle.setdefault((parts.scheme, parts.netloc), deque())
        while True:
            try:
                connection, used = idle.pop(), True
            except IndexError:
                connection, used = _connection(parts), False
            with ticket.on(connection):
                try:
                    response = _ask(connection, parts, headers, ticket)
                except ConnectionError:  # of one that was kept, most likely because the server keeps none so long
                    connection.close()
                    if used:
                        continue
                    raise
                except BaseException:
                    connection.close()
                    raise
                try:
                    yield response
                finally:
                    if response.isclosed() and not response.will_close:
                        idle.append(connection)
                    else:
                        response.close()
                        connection.close()
                return


def _ask(
    connection: http.client.HTTPConnection, parts: SplitResult, headers: Mapping[str, str], ticket: Deadline
) -> http.client.HTTPResponse:
    connection.timeout = ticket.stall()
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)
    proxied = getattr(connection, "proxy_headers", None)
    server = (parts.scheme, parts.netloc) if proxied is not None else ("", "")  # a proxy is told the whole address
    target = urlunsplit((*server, parts.path or "/", parts.query, ""))
    connection.request("GET", target, headers={**headers, **(proxied or {})})
    return connection.getresponse()


def _connection(parts: SplitResult) -> http.client.HTTPConnection:
    """A connection to a server, which is made when it is first used."""
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    secure = parts.scheme == "https"
    if not proxy or proxy_bypass(parts.hostname):
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, **({"context": _tls()} if secure else {}))
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    login = basic_login(through)
    if not secure:
        connection = http.client.HTTPConnection(through.hostname, through.port or 80)
        connection.proxy_headers = {"Proxy-Authorization": login} if login else {}
        return connection
    connection = http.client.HTTPSConnection(through.hostname, through.port or 80, context=_tls())
    connection.set_tunnel(parts.hostname, parts.port or 443, {"Proxy-Authorization": login} if login else {})
    return connection


def basic_login(parts: SplitResult) -> str:
    """The header of an address with a user and a password, else empty."""
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
