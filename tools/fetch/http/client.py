"""HTTP client for media files: whole files or byte ranges, with limits on time and size.

A request ends when nothing arrives for ``FetchLimits.stall`` seconds, and a file after ``FetchLimits.seconds``.
Requests to busy servers (403, 408, 429, 5xx) and refused, broken or stalled connections are retried with backoff. A
broken download continues where it broke if the server can confirm that the file is unchanged (RFC 9110, Range and
If-Range). Bodies are requested and written as they are stored, never decompressed. Redirects stay within http and
https, and never lead from https to http. A login is not sent to another server.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

import httpx2

from framestream.pipeline.storage.headers import content_total, range_start
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.http.response import RemoteFileInfo, parse_digests, raise_for_status, read_file_info
from framestream.tools.fetch.http.retry import (
    FetchLimits,
    TransientFetchError,
    timeout_message,
    too_large_message,
    with_retries,
)

MAX_REDIRECTS = 10  #: followed for one request
REDIRECT_TTL = 240.0  #: seconds for which ranged reads go straight to the target of an earlier redirect
MAX_REDIRECT_CACHE = 1000  #: redirects remembered
INVALID_URL = "the URL is invalid; correct the root map"
INVALID_REDIRECT = "the server redirects to an invalid URL"


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """What is known about a file before it is fetched."""

    size: int = UNKNOWN
    digests: Mapping[str, str] = field(default_factory=dict)  #: hexadecimal, by hashlib name, or "git" for a git blob


class HttpClient:
    """An HTTP client with its connections. Threads may share it.

    Args:
        headers: sent with every request, or a function that returns them, because tokens expire. An Authorization
            header goes only to the server that the URL names.
        login_hint: what to do when a server refuses, for error messages.
    """

    def __init__(
        self,
        limits: FetchLimits,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None,
        login_hint: str = "",
    ) -> None:
        self.limits, self._login_hint = limits, login_hint
        self._headers = headers if callable(headers) else lambda: headers or {}
        self._client = httpx2.Client(headers={"accept-encoding": "identity", "user-agent": "framestream"})
        self._redirects: dict[str, tuple[str, float]] = {}  # by URL: target, and until when it is used
        self._lock = threading.Lock()  # guards _redirects

    def probe(self, url: str, location: object) -> RemoteFileInfo | None:
        """Return what the server states about a file, or None if it has no such file.

        The first byte is requested instead of HEAD: signed URLs refuse HEAD, and HEAD does not show whether ranges
        work.

        Raises:
            FetchError: unreachable, denied, timeout.
        """

        def attempt(deadline: float) -> RemoteFileInfo:
            with self._open(url, {"range": "bytes=0-0"}, deadline) as response:
                # An empty file has no first byte. Its answer is 416 with the size.
                if response.status_code == 416 and (size := content_total(response.headers)) != UNKNOWN:
                    return read_file_info(response, size)
                raise_for_status(response, location, self._login_hint)
                if response.status_code == 206:
                    self._collect(response, 1, location, deadline)  # read the body, so that the connection stays open
                return read_file_info(response)

        try:
            return with_retries(attempt, location, self.limits)
        except FetchError as error:
            if error.reason == "missing_file":
                return None
            raise

    def get(self, url: str, location: object, max_bytes: int) -> tuple[bytes, Mapping[str, str]]:
        """Return a body of at most ``max_bytes`` bytes, and its headers."""

        def attempt(deadline: float) -> tuple[bytes, Mapping[str, str]]:
            with self._open(url, {}, deadline) as response:
                raise_for_status(response, location, self._login_hint)
                data = self._collect(response, max_bytes, location, deadline)
                if len(data) > max_bytes:
                    raise FetchError("too_large", location, f"the server sent more than {max_bytes} bytes")
                return data, response.headers

        return with_retries(attempt, location, self.limits)

    def read(
        self, url: str, location: object, offset: int, size: int, expected: RemoteFileInfo | None
    ) -> tuple[bytes, RemoteFileInfo]:
        """Return ``size`` bytes from ``offset``, all within the file, and what the server states about the file.

        Args:
            expected: what an earlier response stated; the file must still match it.

        Raises:
            FetchError: unsupported if the server ignores ranges, bad_checksum if the file has changed, ...
        """

        def attempt(deadline: float) -> tuple[bytes, RemoteFileInfo]:
            headers = {"range": f"bytes={offset}-{offset + size - 1}"}
            with self._open(url, headers, deadline, cache_redirect=True) as response:
                raise_for_status(response, location, self._login_hint, expect=206)
                info = read_file_info(response)
                if expected is not None and not info.matches(expected):
                    raise FetchError("bad_checksum", location, "the file has changed while it was being read")
                if range_start(response.headers) != offset:
                    raise TransientFetchError("bad_checksum", f"the server did not send the range from byte {offset}")
                data = self._collect(response, size, location, deadline)
                if len(data) < size:
                    raise TransientFetchError("bad_checksum", f"the server sent {len(data)} of {size} bytes")
                return data[:size], info

        return with_retries(attempt, location, self.limits)

    def download(
        self,
        url: str,
        path: Path,
        location: object,
        expected: ExpectedFile | None = None,
        limits: FetchLimits | None = None,
    ) -> None:
        """Write a file to ``path``, and check its length and all known checksums.

        Raises:
            FetchError: missing_file, unreachable, denied, timeout, too_large, bad_checksum. ``path`` may then hold a
                part of the file.
        """
        expected, limits = expected or ExpectedFile(), limits or self.limits
        if expected.size > limits.bytes:
            raise FetchError("too_large", location, too_large_message(limits, expected.size))
        with open(path, "wb") as file:
            download = _Download(file, location, expected, limits)
            with_retries(lambda deadline: self._download(url, download, deadline), location, limits)

    def _download(self, url: str, download: _Download, deadline: float) -> None:
        """Make one attempt at a download."""
        with self._open(url, download.request_headers(), deadline) as response:
            if response.status_code == 416:
                download.restart()
                raise TransientFetchError("bad_checksum", "the server refuses to continue the broken download")
            raise_for_status(response, download.location, self._login_hint)
            download.begin(response)
            longest_before = download.longest
            try:
                for chunk in response.iter_raw():
                    download.write(chunk)
                    if time.monotonic() > deadline:
                        raise FetchError("timeout", download.location, timeout_message(download.limits))
            except (httpx2.HTTPError, httpx2.StreamError, UnicodeError) as error:
                raise _transient_error(error, self.limits, progress=download.longest > longest_before) from None
            download.finish()

    @contextmanager
    def _open(
        self, url: str, headers: Mapping[str, str], deadline: float, cache_redirect: bool = False
    ) -> Iterator[httpx2.Response]:
        """Send a GET request and yield the response after redirects, with its body unread.

        Args:
            cache_redirect: go straight to the target of the last redirect, while it is younger than REDIRECT_TTL.
        """
        try:
            response = None
            with self._lock:
                target, until = self._redirects.pop(url, ("", 0.0)) if cache_redirect else ("", 0.0)
            if time.monotonic() < until:
                response = self._send(target, headers, deadline, login=_same_server(url, target))
                if response.is_success:
                    self._remember_redirect(url, target, until)
                else:  # the signed target has probably expired
                    response.close()
                    response = None
            if response is None:
                response = self._follow(url, headers, deadline)
                if cache_redirect and response.is_success and str(response.url) != url:
                    self._remember_redirect(url, str(response.url), time.monotonic() + REDIRECT_TTL)
        except (httpx2.HTTPError, httpx2.StreamError, UnicodeError) as error:
            raise _transient_error(error, self.limits) from None
        try:
            yield response
        except (httpx2.HTTPError, httpx2.StreamError, UnicodeError) as error:
            raise _transient_error(error, self.limits) from None
        finally:
            response.close()

    def _remember_redirect(self, url: str, target: str, until: float) -> None:
        with self._lock:
            while len(self._redirects) >= MAX_REDIRECT_CACHE:
                del self._redirects[next(iter(self._redirects))]  # the oldest
            self._redirects[url] = target, until

    def _follow(self, url: str, headers: Mapping[str, str], deadline: float) -> httpx2.Response:
        """Send a request and follow redirects."""
        target, login = url, True
        for _ in range(MAX_REDIRECTS + 1):
            response = self._send(target, headers, deadline, login)
            if not response.has_redirect_location:
                return response
            response.close()
            before = target
            try:
                target = str(httpx2.URL(target).join(response.headers["location"]))
            except httpx2.InvalidURL:
                raise TransientFetchError("unreachable", INVALID_REDIRECT, retries=0) from None
            schemes = urlsplit(before).scheme, urlsplit(target).scheme
            if schemes[1] not in ("http", "https") or schemes == ("https", "http"):
                message = f"the server redirects from {schemes[0]}: to {schemes[1]}:"
                raise TransientFetchError("unreachable", message, retries=0)
            login = login and _same_server(before, target)
        raise TransientFetchError("unreachable", f"the server redirects more than {MAX_REDIRECTS} times", retries=0)

    def _send(self, url: str, headers: Mapping[str, str], deadline: float, login: bool) -> httpx2.Response:
        """Send one request, with the Authorization header if ``login``.

        Raises:
            httpx2.TransportError: no response.
        """
        defaults = {name: text for name, text in self._headers().items() if login or name.lower() != "authorization"}
        timeout = httpx2.Timeout(min(self.limits.stall, max(deadline - time.monotonic(), 0.001)))
        try:
            request = self._client.build_request("GET", url, headers={**defaults, **headers}, timeout=timeout)
        except (httpx2.InvalidURL, ValueError):
            raise TransientFetchError("unreachable", INVALID_URL, retries=0) from None
        try:
            return self._client.send(request, stream=True)
        except httpx2.InvalidURL:  # of httpx2 2.14, which joins the redirect that it does not follow
            raise TransientFetchError("unreachable", INVALID_REDIRECT, retries=0) from None

    def _collect(self, response: httpx2.Response, max_bytes: int, location: object, deadline: float) -> bytes:
        """Return the body. If it is longer than ``max_bytes``, return a part that is longer than that."""
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > max_bytes:
                break
            if time.monotonic() > deadline:
                raise FetchError("timeout", location, timeout_message(self.limits))
        return bytes(data)


class _Download:
    """The state of one download over several attempts.

    What has arrived stays in the file between attempts, and the checksums are updated as it arrives. The next attempt
    asks for the rest only, on the condition that the file is unchanged. Otherwise it starts at byte 0 again.
    """

    def __init__(self, file: BinaryIO, location: object, expected: ExpectedFile, limits: FetchLimits) -> None:
        self._file, self.location, self._expected, self.limits = file, location, expected, limits
        self.longest = 0  #: bytes of the longest attempt so far
        self._info: RemoteFileInfo | None = None  # of the response that began with byte 0
        self.restart()

    def request_headers(self) -> dict[str, str]:
        """Return the headers that ask for the rest of the file."""
        if not self._received or self._info is None or not self._info.validator:
            return {}
        return {"range": f"bytes={self._received}-", "if-range": self._info.validator}

    def restart(self) -> None:
        """Discard what has arrived."""
        self._file.seek(0)
        self._file.truncate()
        self._received = 0  # bytes in the file
        self._stated: dict[str, str] = {}  # checksums that the file must have, by hashlib name
        self._hashes: dict[str, hashlib._Hash] = {}

    def begin(self, response: httpx2.Response) -> None:
        """Read the headers of a response, which sends the file from byte 0 or the rest that was asked for."""
        info = read_file_info(response)
        if response.status_code == 206:
            continues = self._received and range_start(response.headers) == self._received
            if not continues or self._info is None or not info.matches(self._info):
                self.restart()
                raise TransientFetchError("bad_checksum", "the file has changed while it was being fetched")
            return
        self.restart()
        self._info = info
        if info.size > self.limits.bytes:
            raise FetchError("too_large", self.location, too_large_message(self.limits, info.size))
        if UNKNOWN not in (info.size, self._expected.size) and info.size != self._expected.size:
            message = f"the server states {info.size} bytes, the listing {self._expected.size}"
            raise TransientFetchError("bad_checksum", message, retries=1)
        self._stated = {**parse_digests(response), **self._expected.digests}
        self._hashes = {name: _hash(name, self._expected.size) for name in self._stated}

    def write(self, chunk: bytes) -> None:
        """Write the next bytes of the file."""
        self._file.write(chunk)
        self._received += len(chunk)
        self.longest = max(self.longest, self._received)
        for hash_state in self._hashes.values():
            hash_state.update(chunk)
        if self._received > self.limits.bytes:
            raise FetchError("too_large", self.location, too_large_message(self.limits))

    def finish(self) -> None:
        """Check the size and the checksums of the complete file."""
        size = self._expected.size if self._info is None or self._info.size == UNKNOWN else self._info.size
        if size not in (UNKNOWN, self._received):
            received = self._received
            self.restart()
            raise TransientFetchError("bad_checksum", f"{received} of {size} bytes have arrived")
        for name, stated in self._stated.items():
            if (actual := self._hashes[name].hexdigest()) != stated:
                self.restart()
                message = f"the {name} of what has arrived is {actual}, its source states {stated}"
                raise TransientFetchError("bad_checksum", message, retries=1)
        self._file.flush()


def redact_url(url: str) -> str:
    """Return a URL or template without user, password and fragment.

    Values of the query become ``...``, except those with a placeholder.
    """
    parts = urlsplit(url)
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(f"{name}={value if '{' in value else '...'}" for name, _, value in pairs)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, query, ""))


def _transient_error(error: Exception, limits: FetchLimits, progress: bool = False) -> TransientFetchError:
    """Return the error of a failed connection. Its message names no URL, which could hold a password."""
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return TransientFetchError("unreachable", INVALID_URL, retries=0)
    if isinstance(error, httpx2.RemoteProtocolError) and "location header" in str(error):
        return TransientFetchError("unreachable", INVALID_REDIRECT, retries=0)
    if isinstance(error, httpx2.TimeoutException):
        return TransientFetchError("unreachable", f"nothing arrived for {limits.stall:g} s", progress=progress)
    if isinstance(error, httpx2.RemoteProtocolError) and "expected" in str(error):  # fewer bytes than Content-Length
        return TransientFetchError("bad_checksum", "the server sent less than it stated", progress=progress)
    text = " ".join(str(error).split()) or type(error).__name__
    message = f"the connection broke ({text})"
    if isinstance(error, httpx2.ConnectError):
        message = f"cannot connect ({text}); check the address and the network"
    return TransientFetchError("unreachable", message, progress=progress)


def _hash(name: str, size: int) -> hashlib._Hash:
    """Return a hash state. The id of a git blob is the SHA-1 of a header with its size, and then its contents."""
    state = hashlib.new("sha1" if name == "git" else name, usedforsecurity=False)
    if name == "git":
        state.update(b"blob %d\0" % size)
    return state


def _same_server(a: str, b: str) -> bool:
    """Return whether two URLs have the same scheme, host and port."""
    return urlsplit(a)[:2] == urlsplit(b)[:2]
