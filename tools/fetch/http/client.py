"""A careful HTTP client: files whole or by ranges, within limits, whatever the server does.

Every request is given up when nothing comes for ``Limits.stall`` seconds and every file after ``Limits.seconds``.
Busy servers (403, 408, 429, 5xx), refused, broken and stalled connections are tried again with backoff; a broken
download goes on from where it broke if the server can tell that the file is still the same (RFC 9110, Range and
If-Range). Bodies are asked for and written as they are stored, never decompressed. Redirects stay within http and https
and never fall back from https to http; a login is not sent on to another server.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

import httpx2

from framestream.pipeline.storage.headers import content_total, range_start
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.http.response import RemoteFileInfo, digests, raise_for_status, read_facts
from framestream.tools.fetch.http.retry import FetchLimits, TransientFetchError, out_of_time, too_large, with_retries

REDIRECTS = 10  #: followed one after another
KEPT_REDIRECT = 240.0  #: seconds for which ranged reads of one file go straight to where it was found


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a file before it is fetched."""

    size: int = UNKNOWN
    digests: Mapping[str, str] = field(default_factory=dict)  #: hexadecimal, by hashlib name, or "git" for a git blob


class HttpClient:
    """A client with its connections; threads may share it.

    Args:
        headers: sent to the server that a request names, and of these a login to no other.
        login: what to do about a server that refuses, for the error line.
    """

    def __init__(self, limits: FetchLimits, headers: Mapping[str, str] | None = None, login: str = "") -> None:
        self.limits, self._headers, self._login = limits, dict(headers or {}), login
        self._client = httpx2.Client(headers={"accept-encoding": "identity", "user-agent": "framestream"})
        self._moved: dict[str, tuple[str, float]] = {}  # where addresses redirected to, and until when that counts
        self._lock = threading.Lock()

    def probe(self, url: str, place: object) -> RemoteFileInfo | None:
        """What the server says about a file, or None if it has none. Asks for the first byte rather than by HEAD, which
        signed addresses refuse and which does not tell whether ranges work.

        Raises:
            FetchError: unreachable, denied, timeout.
        """

        def attempt(deadline: float) -> RemoteFileInfo:
            with self._open(url, {"range": "bytes=0-0"}, deadline) as response:
                if (
                    response.status_code == 416 and (size := content_total(response.headers)) != UNKNOWN
                ):  # an empty file
                    return read_facts(response, size)
                raise_for_status(response, place, self._login)
                if response.status_code == 206:
                    self._collect(response, 1, place, deadline)  # read to its end, so that the connection is kept
                return read_facts(response)

        try:
            return with_retries(attempt, place, self.limits)
        except FetchError as error:
            if error.reason == "missing_file":
                return None
            raise

    def get(self, url: str, place: object, most: int) -> tuple[bytes, Mapping[str, str]]:
        """A body of at most ``most`` bytes, and its headers."""

        def attempt(deadline: float) -> tuple[bytes, Mapping[str, str]]:
            with self._open(url, {}, deadline) as response:
                raise_for_status(response, place, self._login)
                data = self._collect(response, most, place, deadline)
                if len(data) > most:
                    raise FetchError("too_large", place, f"the server sent more than {most} bytes")
                return data, response.headers

        return with_retries(attempt, place, self.limits)

    def read(
        self, url: str, place: object, offset: int, size: int, known: RemoteFileInfo | None
    ) -> tuple[bytes, RemoteFileInfo]:
        """``size`` bytes from ``offset``, all of them within the file; and what the server says about the file, which
        must be what is ``known``.

        Raises:
            FetchError: unsupported if the server ignores ranges, bad_checksum if the file is another one now, ...
        """

        def attempt(deadline: float) -> tuple[bytes, RemoteFileInfo]:
            wanted = {"range": f"bytes={offset}-{offset + size - 1}"}
            with self._open(url, wanted, deadline, keep=True) as response:
                raise_for_status(response, place, self._login, expect=206)
                facts = read_facts(response)
                if known is not None and not facts.same(known):
                    raise FetchError("bad_checksum", place, "the file has changed while it was being read")
                if range_start(response.headers) != offset:
                    raise TransientFetchError("bad_checksum", f"the server sent another part than byte {offset}")
                data = self._collect(response, size, place, deadline)
                if len(data) < size:
                    raise TransientFetchError("bad_checksum", f"the server sent {len(data)} of {size} bytes")
                return data[:size], facts

        return with_retries(attempt, place, self.limits)

    def download(
        self, url: str, path: Path, place: object, expected: Expected | None = None, limits: FetchLimits | None = None
    ) -> None:
        """Write a file to ``path``; its length and every checksum that is known are those of its place.

        Raises:
            FetchError: missing_file, unreachable, denied, timeout, too_large, bad_checksum; ``path`` may then hold a
                part of the file.
        """
        expected, limits = expected or Expected(), limits or self.limits
        if expected.size > limits.bytes:
            raise FetchError("too_large", place, too_large(limits, expected.size))
        with open(path, "wb") as file:
            transfer = _Transfer(file, place, expected, limits)
            with_retries(lambda deadline: self._transfer(url, transfer, deadline), place, limits)

    def _transfer(self, url: str, transfer: _Transfer, deadline: float) -> None:
        """One try of a download."""
        with self._open(url, transfer.headers(), deadline) as response:
            if response.status_code == 416:
                transfer.restart()
                raise TransientFetchError("bad_checksum", "the server refuses to go on from where it broke off")
            raise_for_status(response, transfer.place, self._login)
            transfer.begin(response)
            before = transfer.best
            try:
                for chunk in response.iter_raw():
                    transfer.write(chunk)
                    if time.monotonic() > deadline:
                        raise FetchError("timeout", transfer.place, out_of_time(transfer.limits))
            except httpx2.TransportError as error:
                raise _again(error, self.limits, progress=transfer.best > before) from None
            transfer.finish()

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str], deadline: float, keep: bool = False) -> Iterator:
        """The answer to GET after redirects, unread. With ``keep`` the last redirect is remembered for a while."""
        try:
            response = None
            with self._lock:
                target, until = self._moved.pop(url, ("", 0.0)) if keep else ("", 0.0)
            if time.monotonic() < until:
                response = self._send(target, headers, deadline, login=_same_server(url, target))
                if response.is_success:
                    self._remember(url, target, until)
                else:  # most likely no longer valid
                    response.close()
                    response = None
            if response is None:
                response = self._follow(url, headers, deadline)
                if keep and response.is_success and str(response.url) != url:
                    self._remember(url, str(response.url), time.monotonic() + KEPT_REDIRECT)
        except httpx2.TransportError as error:
            raise _again(error, self.limits) from None
        try:
            yield response
        except httpx2.TransportError as error:
            raise _again(error, self.limits) from None
        finally:
            response.close()

    def _remember(self, url: str, target: str, until: float) -> None:
        with self._lock:
            while len(self._moved) >= 1000:
                del self._moved[next(iter(self._moved))]
            self._moved[url] = target, until

    def _follow(self, url: str, headers: Mapping[str, str], deadline: float) -> httpx2.Response:
        target, login = url, True
        for _ in range(REDIRECTS + 1):
            response = self._send(target, headers, deadline, login)
            if not response.has_redirect_location:
                return response
            response.close()
            before = target
            try:
                target = str(httpx2.URL(target).join(response.headers["location"]))
            except httpx2.InvalidURL:
                raise TransientFetchError(
                    "unreachable", "the server redirects to an address that is none", retries=0
                ) from None
            schemes = urlsplit(before).scheme, urlsplit(target).scheme
            if schemes[1] not in ("http", "https") or schemes == ("https", "http"):
                raise TransientFetchError(
                    "unreachable", f"the server redirects from {schemes[0]}: to {schemes[1]}:", retries=0
                )
            login = login and _same_server(before, target)
        raise TransientFetchError("unreachable", f"the server redirects more than {REDIRECTS} times", retries=0)

    def _send(self, url: str, headers: Mapping[str, str], deadline: float, login: bool) -> httpx2.Response:
        """One request; TransportError if it fails."""
        own = {name: text for name, text in self._headers.items() if login or name.lower() != "authorization"}
        wait = min(self.limits.stall, max(deadline - time.monotonic(), 0.001))
        try:
            request = self._client.build_request("GET", url, headers={**own, **headers}, timeout=httpx2.Timeout(wait))
        except (httpx2.InvalidURL, ValueError):
            raise TransientFetchError("unreachable", "the address is none; correct the root map", retries=0) from None
        return self._client.send(request, stream=True)

    def _collect(self, response: httpx2.Response, most: int, place: object, deadline: float) -> bytes:
        """A whole body, or its beginning if that is more than ``most`` bytes."""
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > most:
                break
            if time.monotonic() > deadline:
                raise FetchError("timeout", place, out_of_time(self.limits))
        return bytes(data)


class _Transfer:
    """A file on its way, over several tries."""

    def __init__(self, file: BinaryIO, place: object, expected: Expected, limits: FetchLimits) -> None:
        self._file, self.place, self._expected, self.limits = file, place, expected, limits
        self.best = 0  #: bytes of the best try
        self._facts: RemoteFileInfo | None = None
        self.restart()

    def headers(self) -> dict[str, str]:
        """What asks for the rest of the file."""
        if not self._done or not self._facts.validator:
            return {}
        return {"range": f"bytes={self._done}-", "if-range": self._facts.validator}

    def restart(self) -> None:
        """Throw away what has come."""
        self._file.seek(0)
        self._file.truncate()
        self._done = 0
        self._stated: dict[str, str] = {}
        self._hashes: dict[str, hashlib._Hash] = {}

    def begin(self, response: httpx2.Response) -> None:
        """Take the head of an answer: the file from its start, or the rest that was asked for."""
        facts = read_facts(response)
        if response.status_code == 206:
            if not self._done or range_start(response.headers) != self._done or not facts.same(self._facts):
                self.restart()
                raise TransientFetchError("bad_checksum", "the file has changed while it was being fetched")
            return
        self.restart()
        self._facts = facts
        if facts.size > self.limits.bytes:
            raise FetchError("too_large", self.place, too_large(self.limits, facts.size))
        if UNKNOWN not in (facts.size, self._expected.size) and facts.size != self._expected.size:
            message = f"the server offers {facts.size} bytes of a file of {self._expected.size}"
            raise TransientFetchError("bad_checksum", message, retries=1)
        self._stated = {**digests(response), **self._expected.digests}
        self._hashes = {name: _hash(name, self._expected.size) for name in self._stated}

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._done += len(chunk)
        self.best = max(self.best, self._done)
        for digest in self._hashes.values():
            digest.update(chunk)
        if self._done > self.limits.bytes:
            raise FetchError("too_large", self.place, too_large(self.limits))

    def finish(self) -> None:
        """Check the whole file."""
        size = self._expected.size if self._facts.size == UNKNOWN else self._facts.size
        if size not in (UNKNOWN, self._done):
            done = self._done
            self.restart()
            raise TransientFetchError("bad_checksum", f"{done} bytes have come of a file of {size}")
        for name, stated in self._stated.items():
            if (found := self._hashes[name].hexdigest()) != stated:
                self.restart()
                raise TransientFetchError(
                    "bad_checksum", f"arrived with {name} {found}, its place states {stated}", retries=1
                )
        self._file.flush()


def redacted(url: str) -> str:
    """An address or template for error lines: without user, password, fragment and the values of the query, except
    those that hold a placeholder."""
    parts = urlsplit(url)
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(f"{name}={value if '{' in value else '...'}" for name, _, value in pairs)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _again(error: httpx2.TransportError, limits: FetchLimits, progress: bool = False) -> TransientFetchError:
    """A failed connection; its line names no address, which could hold a password."""
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return TransientFetchError("unreachable", "the address is none; correct the root map", retries=0)
    if isinstance(error, httpx2.TimeoutException):
        return TransientFetchError("unreachable", f"nothing came for {limits.stall:g} s", progress=progress)
    if isinstance(error, httpx2.RemoteProtocolError) and "expected" in str(error):  # fewer than Content-Length
        return TransientFetchError("bad_checksum", "the server sent less than it said", progress=progress)
    kind = "cannot connect" if isinstance(error, httpx2.ConnectError) else "the connection broke"
    text = " ".join(str(error).split()) or type(error).__name__
    return TransientFetchError("unreachable", f"{kind} ({text})", progress=progress)


def _hash(name: str, size: int) -> hashlib._Hash:
    digest = hashlib.new("sha1" if name == "git" else name, usedforsecurity=False)
    if name == "git":  # a git blob's name
        digest.update(b"blob %d\0" % size)
    return digest


def _same_server(a: str, b: str) -> bool:
    return urlsplit(a)[:2] == urlsplit(b)[:2]
