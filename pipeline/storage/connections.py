"""Keep HTTP connections open, and end every request at its deadline.

The connections are those of ``http.client``: reading frames means thousands of small requests, and it takes the least
processor time for each (docs/performance.md). Proxies are read from the environment.
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

IDLE_SHARE = 0.25  #: share of the time limit for which a request may wait for a byte, so that retries have time


class Deadline:
    """Time limit of one read, shared by its requests; :meth:`cancel` ends those that still run."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.expires_at = seconds, time.monotonic() + seconds
        self._cancelled = threading.Event()
        self._active: set[http.client.HTTPConnection] = set()

    @property
    def remaining(self) -> float:
        """Seconds left; negative after the deadline."""
        return self.expires_at - time.monotonic()

    def restart(self) -> None:
        """Let the time limit begin now."""
        self.expires_at = time.monotonic() + self.seconds

    def sleep(self, seconds: float) -> None:
        """Sleep, but not past the deadline, nor after :meth:`cancel`."""
        self._cancelled.wait(max(min(seconds, self.remaining), 0))

    def idle_timeout(self) -> float:
        """Return the seconds for which a request may wait for a byte.

        Raises:
            TimeoutError: the deadline has passed.
        """
        if self._cancelled.is_set() or self.remaining <= 0:
            raise TimeoutError(self.timeout_message())
        return min(self.seconds * IDLE_SHARE, self.remaining)

    def timeout_message(self) -> str:
        """Return the text for errors after the deadline."""
        return f"took longer than loader.read_timeout ({self.seconds:g} s)"

    def cancel(self) -> None:
        """Abort the requests that still run, and refuse new ones."""
        self._cancelled.set()
        for connection in list(self._active):
            if (sock := connection.sock) is not None:
                with contextlib.suppress(OSError):  # closed meanwhile
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def track(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        """Let :meth:`cancel` abort what runs on ``connection`` within the block."""
        self._active.add(connection)
        try:
            yield
        finally:
            self._active.discard(connection)


class ConnectionPool:
    """The connections of one process to all servers; threads share them."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], deque[http.client.HTTPConnection]] = {}

    def take_idle(self, url: str) -> http.client.HTTPConnection | None:
        """Return an open connection to the server of ``url`` itself that nobody uses, for :meth:`give_back`."""
        parts = urlsplit(url)
        idle = self._idle.get((parts.scheme, parts.netloc))
        try:
            connection = idle.pop() if idle else None
        except IndexError:  # another thread was faster
            return None
        if isinstance(connection, _ProxiedConnection):  # its requests have another form
            self.give_back(url, connection)
            return None
        return connection

    def give_back(self, url: str, connection: http.client.HTTPConnection) -> None:
        """Let others use a connection whose last response was read."""
        parts = urlsplit(url)
        self._idle.setdefault((parts.scheme, parts.netloc), deque()).append(connection)

    @contextlib.contextmanager
    def request(self, url: str, headers: Mapping[str, str], deadline: Deadline) -> Iterator[http.client.HTTPResponse]:
        """Send GET and yield the response with its body unread; the connection is reused if the body is read fully.

        Raises:
            OSError, http.client.HTTPException: there was no response.
        """
        parts = urlsplit(url)
        idle = self._idle.setdefault((parts.scheme, parts.netloc), deque())
        while True:
            try:
                connection, is_reused = idle.pop(), True
            except IndexError:
                connection, is_reused = _make_connection(parts), False
            with deadline.track(connection):
                try:
                    response = _send(connection, parts, headers, deadline)
                except ConnectionError:
                    connection.close()
                    if is_reused:  # most likely closed by the server while it was idle
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


def _send(
    connection: http.client.HTTPConnection, parts: SplitResult, headers: Mapping[str, str], deadline: Deadline
) -> http.client.HTTPResponse:
    connection.timeout = deadline.idle_timeout()
    if connection.sock is not None:
        connection.sock.settimeout(connection.timeout)
    server = ("", "")
    if isinstance(connection, _ProxiedConnection):
        server = (parts.scheme, parts.netloc)  # a proxy needs the complete address
        headers = {**headers, **connection.login}
    target = urlunsplit((*server, parts.path or "/", parts.query, ""))
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


class _ProxiedConnection(http.client.HTTPConnection):
    """A plain connection to a proxy, which passes requests for http addresses on."""

    login: Mapping[str, str] = {}  #: header fields for the proxy


def _make_connection(parts: SplitResult) -> http.client.HTTPConnection:
    """Make a connection to a server; it is opened when it is first used."""
    host = parts.hostname or ""
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    secure = parts.scheme == "https"
    if not proxy or proxy_bypass(host):
        if secure:
            return http.client.HTTPSConnection(host, parts.port, context=_tls())
        return http.client.HTTPConnection(host, parts.port)
    proxy_parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    proxy_host, proxy_port = proxy_parts.hostname or "", proxy_parts.port or 80
    login = basic_login(proxy_parts)
    proxy_headers = {"Proxy-Authorization": login} if login else {}
    if not secure:
        plain = _ProxiedConnection(proxy_host, proxy_port)
        plain.login = proxy_headers
        return plain
    tunnel = http.client.HTTPSConnection(proxy_host, proxy_port, context=_tls())
    tunnel.set_tunnel(host, parts.port or 443, proxy_headers)
    return tunnel


def basic_login(parts: SplitResult) -> str:
    """Return the Authorization header of an address with user and password, or an empty string."""
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
