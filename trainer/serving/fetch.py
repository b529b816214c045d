"""Fetch a file from an address that a client named, without reaching what only this machine can reach.

Every address is resolved once, and the connection goes to the resolved numbers, so a second answer of the name server
changes nothing. Numbers of private, loopback, link-local, reserved and multicast networks are refused. Redirects are
followed here, each with the same checks. Proxies of the environment are not used.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import socket
import time
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

import httpx2

from framestream.trainer.serving.errors import RequestError

MAX_REDIRECTS = 5
MAX_URL = 4096  #: characters
REDIRECTS = (301, 302, 303, 307, 308)
#: IPv6 networks that lead to IPv4 addresses, or to no public ones
TRANSLATED = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


def is_public(address: str) -> bool:
    """Return whether a numeric IP address is a public one."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address):
        if number.ipv4_mapped is not None:
            number = number.ipv4_mapped
        elif number.is_site_local or any(number in network for network in TRANSLATED):
            return False
    return number.is_global and not number.is_multicast and not number.is_reserved


def resolve_public(host: str, port: int, param: str) -> str:
    """Resolve a host to a numeric address; all that its name stands for must be public.

    Raises:
        RequestError: it cannot be resolved, or is not public.
    """
    try:
        found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise RequestError(400, f"{param}: the host of the address cannot be resolved", "invalid_url", param)
    if not all(is_public(str(address)) for address in found):
        text = f"{param}: the address is not a public one; upload the file, or send a data: URL"
        raise RequestError(400, text, "address_not_allowed", param)
    return str(found[0])


@contextlib.contextmanager
def fetch_file(url: str, param: str, max_bytes: int, seconds: float) -> Iterator[io.RawIOBase]:
    """Open a file at an address for reading.

    Args:
        url: http or https.
        param: the field of the request that names it.
        max_bytes: of the file.
        seconds: for all of it.

    Raises:
        RequestError: it may not be fetched, is not there, is too large, or takes too long.
    """
    deadline = time.monotonic() + seconds
    with httpx2.Client(trust_env=False, follow_redirects=False, timeout=min(seconds, 10.0)) as client:
        for _ in range(MAX_REDIRECTS + 1):
            request = _pinned_request(client, url, param)
            try:
                response = client.send(request, stream=True)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
                raise _failed(param, type(error).__name__) from None
            with contextlib.closing(response):
                if response.status_code not in REDIRECTS:
                    yield _Body(response, param, max_bytes, deadline)
                    return
                url = urljoin(url, response.headers.get("location", ""))
            if time.monotonic() > deadline:
                break
    raise _failed(param, "too many redirects")


def _pinned_request(client: httpx2.Client, url: str, param: str) -> httpx2.Request:
    """Make a request that goes to the checked number of the host, under the host's name."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        host = ""
    if not host or len(url) > MAX_URL or parts.username or parts.password:
        text = f"{param}: is not an http or https address without a login"
        raise RequestError(400, text, "invalid_url", param)
    number = resolve_public(host, port, param)
    netloc = f"[{number}]" if ":" in number else number
    name = f"[{host}]" if ":" in host else host
    headers = {"host": name if parts.port is None else f"{name}:{port}", "accept-encoding": "identity"}
    target = f"{parts.scheme}://{netloc}:{port}{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    try:
        return client.build_request("GET", target, headers=headers, extensions={"sni_hostname": host})
    except (httpx2.InvalidURL, UnicodeError):
        raise RequestError(400, f"{param}: is not a valid address", "invalid_url", param) from None


def _failed(param: str, reason: str) -> RequestError:
    return RequestError(400, f"{param}: the file cannot be fetched ({reason})", "fetch_failed", param)


class _Body(io.RawIOBase):
    """The body of a response, within limits."""

    def __init__(self, response: httpx2.Response, param: str, max_bytes: int, deadline: float) -> None:
        if response.status_code != 200:
            raise _failed(param, f"status {response.status_code}")
        self._param, self._left, self._deadline = param, max_bytes, deadline
        self._max_bytes = max_bytes
        length = response.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > max_bytes:
            raise self._too_large()
        self._parts = response.iter_raw(1 << 16)

    def read(self, size: int = -1) -> bytes:
        """Return the next part of the body, whatever ``size`` is; empty at its end."""
        if time.monotonic() > self._deadline:
            raise _failed(self._param, "it takes too long")
        try:
            part = next(self._parts, b"")
        except (httpx2.HTTPError, OSError) as error:
            raise _failed(self._param, type(error).__name__) from None
        self._left -= len(part)
        if self._left < 0:
            raise self._too_large()
        return part

    def _too_large(self) -> RequestError:
        text = f"{self._param}: the file has over {self._max_bytes:,} bytes; fetch a smaller one"
        return RequestError(413, text, "file_too_large", self._param)
