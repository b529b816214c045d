"""Ranged reads over HTTP (RFC 9110, sections 14 and 15): redirects, refusals and retries.

Redirects stay within http and https, never go from https to http, and never send a login to another server.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

from framestream.pipeline.storage.connections import ConnectionPool, Deadline
from framestream.pipeline.storage.headers import (
    UNKNOWN,
    Headers,
    content_total,
    parse_int,
    range_start,
    retry_after,
)
from framestream.pipeline.utils.retry import TransientError, backoff, call_with_retries, count_tries

MAX_REDIRECTS = 10  #: followed one after another
REDIRECTING = (301, 302, 303, 307, 308)
REDIRECT_LIFETIME = 600.0  #: seconds for which reads of a file go directly to the target of its redirect
REDIRECT_CACHE_SIZE = 10_000  #: files
BACKOFF = 0.25  #: seconds; the wait before retry n is drawn uniformly from 0 to BACKOFF * 2**n
MAX_BACKOFF = 10.0  #: seconds
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
FORBIDDEN_RETRIES = 2  #: retries of 403, which some busy servers send instead of 503


@dataclass(frozen=True, slots=True)
class Address:
    """Where a file is read."""

    url: str
    display_url: str  #: the same for messages, without password or signature
    headers: Mapping[str, str] = field(default_factory=dict)  #: sent to the server of ``url`` and to no other
    login_hint: str = ""  #: for messages: what to do if the server refuses
    network_hint: str = "check the address and the network"  #: the same if it cannot be reached


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """A range of a file, as received."""

    data: bytes | memoryview
    total: int  #: bytes of the complete file
    identity: str  #: ETag or modification date; differs if the file has changed


class TransientReadError(TransientError):
    """A failed request that may succeed later.

    Args:
        error: the exception raised when no tries are left; its message begins with the file's address.
        wait: seconds that the server asks to wait.
        retries: fewer retries than allowed otherwise.
    """

    def __init__(self, error: type[OSError], message: str, wait: float = 0.0, retries: int | None = None) -> None:
        super().__init__(message, wait, retries)
        self.error = error


@dataclass(frozen=True, slots=True)
class ReadRetries:
    """The retry policy of one request (see :class:`framestream.pipeline.utils.retry.RetryPolicy`)."""

    address: Address
    deadline: Deadline
    retries: int

    def remaining(self) -> float:
        return self.deadline.remaining

    def delay(self, failure: TransientReadError, tries: int) -> float:
        return failure.wait + backoff(BACKOFF, MAX_BACKOFF, tries)

    def sleep(self, seconds: float) -> None:
        self.deadline.sleep(seconds)

    def final_error(self, failure: TransientReadError, tries: int, delay: float | None) -> OSError:
        late = "" if delay is None else f"; another one {self.deadline.timeout_message()}"
        return failure.error(f"{self.address.display_url}: {failure} ({count_tries(tries)}{late})")


class RangeClient:
    """The requests of one process; threads share it."""

    def __init__(self) -> None:
        self.connections = ConnectionPool()
        self._redirects: dict[str, tuple[str, float]] = {}  # address -> (target, until when the target is used)

    def fetch(
        self,
        address: Address,
        offset: int,
        size: int,
        deadline: Deadline,
        retries: int,
        failure: TransientReadError | None = None,
    ) -> RangeResponse:
        """Read ``size`` bytes of a file from ``offset``, or fewer if the file ends before.

        Args:
            failure: how the first try has ended, if one was made already.

        Raises:
            FileNotFoundError, PermissionError, TimeoutError, ConnectionError: one line that names the file.
            ValueError: the server cannot send ranges, or gives another answer that no retry changes.
        """

        failures = [failure] if failure else []

        def attempt() -> RangeResponse:
            if failures:
                raise failures.pop()
            try:
                with self.open_range(address, offset, size, deadline) as response:
                    return read_range(address, response, offset, size)
            except (OSError, http.client.HTTPException) as error:
                raise connection_error(error, address, deadline) from None

        return call_with_retries(attempt, TransientReadError, ReadRetries(address, deadline, retries))

    @contextlib.contextmanager
    def open_range(
        self, address: Address, offset: int, size: int, deadline: Deadline
    ) -> Iterator[http.client.HTTPResponse]:
        """Request a range once, follow redirects, and yield the response with its body unread, whatever its status.

        Raises:
            ValueError, TransientReadError: the redirects cannot be followed.
            OSError, http.client.HTTPException: there was no response.
        """
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}"}
        target, headers, is_cached = self.target(address)
        for _ in range(MAX_REDIRECTS + 1):
            with self.connections.request(target, {**headers, **wanted}, deadline) as response:
                if response.status in REDIRECTING and "location" in response.headers:
                    target = _redirect_target(target, response.headers["location"])
                    headers = _headers(address, target)
                elif is_cached and response.status not in (206, 416):  # most likely expired
                    self.forget_redirect(address)
                    target, headers, is_cached = self.target(address)
                else:
                    yield response
                    if target != address.url and not is_cached:
                        self._cache_redirect(address.url, target)
                    return
        raise ValueError(f"{address.display_url}: the server redirects more than {MAX_REDIRECTS} times")

    def target(self, address: Address) -> tuple[str, dict[str, str], bool]:
        """Return where to read a file now, the headers for that server, and whether an earlier redirect led there."""
        target, until = self._redirects.get(address.url, ("", 0.0))
        is_cached = time.monotonic() < until
        target = target if is_cached else address.url
        return target, _headers(address, target), is_cached

    def forget_redirect(self, address: Address) -> None:
        """Read a file at its own address again."""
        self._redirects.pop(address.url, None)

    def _cache_redirect(self, url: str, target: str) -> None:
        if len(self._redirects) >= REDIRECT_CACHE_SIZE:
            self._redirects.clear()
        self._redirects[url] = target, time.monotonic() + REDIRECT_LIFETIME


def read_range(address: Address, response: http.client.HTTPResponse, offset: int, size: int) -> RangeResponse:
    """Read and check the body of a response."""
    total, identity = range_total(address, response, offset)
    wanted = max(min(size, total - offset), 0)
    if not wanted and response.status == 416:
        return RangeResponse(b"", total, identity)
    data = response.read(wanted)
    stated = parse_int(response.headers.get("content-length", ""))
    if len(data) != wanted or stated not in (UNKNOWN, wanted):
        raise TransientReadError(ConnectionError, f"the server sent {len(data)} of {wanted} bytes")
    if not response.isclosed():
        response.read(1)  # consume the end of a chunked body, so that the connection can be used again
    return RangeResponse(data, total, identity)


def range_total(address: Address, response: http.client.HTTPResponse, offset: int) -> tuple[int, str]:
    """Return the bytes of the complete file and its identity, as the response to a range from ``offset`` states them.

    Raises:
        TransientReadError, ValueError: the response is not the range that was requested.
    """
    headers, status = response.headers, response.status
    identity = headers.get("etag", "") or headers.get("last-modified", "")
    total = content_total(headers)
    if status == 416 and 0 <= total <= offset:  # the range begins at or after the end, as in an empty file
        return total, identity
    _check_status(address, status, headers)
    if range_start(headers) != offset:
        raise TransientReadError(ConnectionError, f"the server sent another part than byte {offset}")
    if total == UNKNOWN:
        raise ValueError(f"{address.display_url}: the server does not state the size of the file")
    return total, identity


def _check_status(address: Address, status: int, headers: Headers) -> None:
    """Raise unless the response contains a part of the file as it is stored."""
    phrase = next((f" {known.phrase}" for known in HTTPStatus if known == status), "")
    answer = f"the server answered {status}{phrase}"
    refusal = f"{answer}{address.login_hint and '; '}{address.login_hint}"
    if status == 206:
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise ValueError(f"{address.display_url}: the server insists on sending it compressed ({encoding})")
        return
    if status == 200:
        fix = "serve the root from one that can, such as nginx or a bucket, or copy it"
        raise ValueError(f"{address.display_url}: the server cannot send parts of a file; {fix}")
    if region := headers.get("x-amz-bucket-region", "") if status in (301, 307, 400) else "":
        raise ValueError(f"{address.display_url}: the bucket is in region {region}; set AWS_REGION={region}")
    if status in (404, 410):
        raise TransientReadError(FileNotFoundError, answer, retries=0)
    if status in (401, 402, 407, 451):
        raise TransientReadError(PermissionError, refusal, retries=0)
    if status == 403:
        raise TransientReadError(PermissionError, refusal, retries=FORBIDDEN_RETRIES)
    if status in (408, 425, 429) or status >= 500:
        raise TransientReadError(ConnectionError, answer, wait=retry_after(headers))
    raise ValueError(f"{address.display_url}: {answer}")


def _redirect_target(origin: str, location: str) -> str:
    """Return the address to which a redirect leads."""
    target = urljoin(origin, location)
    schemes = urlsplit(origin).scheme, urlsplit(target).scheme
    if schemes[1] not in ("http", "https") or schemes == ("https", "http") or not urlsplit(target).hostname:
        message = f"the server redirects from {schemes[0]}: to {schemes[1] or 'nowhere'}:"
        raise TransientReadError(ConnectionError, message, retries=0)
    return target


def connection_error(error: OSError | http.client.HTTPException, address: Address, deadline: Deadline) -> Exception:
    """Describe a failed connection in one line without its address, which may contain a password."""
    if deadline.remaining <= 0:
        return TimeoutError(f"{address.display_url}: {deadline.timeout_message()}")
    if isinstance(error, TimeoutError):
        return TransientReadError(TimeoutError, "the server sent nothing for too long")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectionError(f"{address.display_url}: the server's certificate is not valid ({error.verify_message})")
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (socket.gaierror, ConnectionRefusedError)) or getattr(error, "errno", None) in UNREACHABLE:
        return TransientReadError(ConnectionError, f"the server cannot be reached ({text}); {address.network_hint}")
    return TransientReadError(ConnectionError, f"the connection broke ({text})")


def _headers(address: Address, target: str) -> dict[str, str]:
    """Return the headers for the server of ``target``."""
    own = address.headers if _same_server(target, address.url) else {}
    return {"User-Agent": "framestream", "Accept-Encoding": "identity", **own}


def _same_server(a: str, b: str) -> bool:
    return a == b or urlsplit(a)[:2] == urlsplit(b)[:2]
