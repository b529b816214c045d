"""Ranged reads over HTTP (RFC 9110, sections 14 and 15): redirects, refusals, and trying again.

Redirects stay within http and https, never fall back from https to http, and take a login to no other server.
"""

from __future__ import annotations

import http.client
import random
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

from framestream.pipeline.storage.connections import ConnectionPool, Deadline
from framestream.pipeline.storage.headers import UNKNOWN, content_total, parse_int, range_start, retry_after

REDIRECTS = 10  #: followed one after another
REDIRECTING = (301, 302, 303, 307, 308)
KEPT_REDIRECT = 600.0  #: seconds for which reads of a file go straight to where it was found
KEPT_REDIRECTS = 10_000  #: files
BACKOFF = 0.25  #: seconds; the wait before retry n is drawn evenly from 0 to BACKOFF * 2**n
LONGEST_BACKOFF = 10.0  #: seconds
REFUSALS = 2  #: retries of 403, which means no, but is how some servers say that they are busy


@dataclass(frozen=True, slots=True)
class Address:
    """Where a file is read."""

    url: str
    shown: str  #: the same for messages: no password, no signature
    headers: Mapping[str, str] = field(default_factory=dict)  #: sent to the server of ``url`` and to no other
    login: str = ""  #: what to do about a refusal, for messages


@dataclass(frozen=True, slots=True)
class RangeResponse:
    """A range of a file, as it came."""

    data: bytes
    total: int  #: bytes of the whole file
    identity: str  #: ETag or date: another text where the file is another


class RetryableError(Exception):
    """A failure that may pass.

    Args:
        error: what it becomes when no tries are left; its text follows the file's name.
        wait: seconds that the server asks for.
        retries: fewer retries than allowed otherwise.
    """

    def __init__(self, error: type[OSError], message: str, wait: float = 0.0, retries: int | None = None) -> None:
        super().__init__(message)
        self.error, self.wait, self.retries = error, wait, retries


class RangeClient:
    """Requests of one process; threads share it."""

    def __init__(self) -> None:
        self._connections = ConnectionPool()
        self._moved: dict[str, tuple[str, float]] = {}  # where addresses redirected to, and until when that counts

    def fetch(self, address: Address, offset: int, size: int, ticket: Deadline, retries: int) -> RangeResponse:
        """The bytes of a file from ``offset``: ``size`` of them, or fewer where the file ends before.

        Raises:
            FileNotFoundError, PermissionError, TimeoutError, ConnectionError: one line that names the file.
            ValueError: the server cannot send ranges, or answers with something else that no retry changes.
        """
        tries = 0
        while True:
            try:
                return self._attempt(address, offset, size, ticket)
            except RetryableError as again:
                tries += 1
                allowed = retries if again.retries is None else min(retries, again.retries)
                wait = again.wait + random.uniform(0, min(BACKOFF * 2**tries, LONGEST_BACKOFF))
                if tries > allowed:
                    raise again.error(f"{address.shown}: {again} (try {tries})") from None
                if wait >= ticket.left:
                    raise again.error(f"{address.shown}: {again} (try {tries}; another one {ticket.late()})") from None
            ticket.wait(wait)

    def _attempt(self, address: Address, offset: int, size: int, ticket: Deadline) -> RangeResponse:
        """One try, through redirects."""
        wanted = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        target, until = self._moved.get(address.url, ("", 0.0))
        known = time.monotonic() < until
        target = target if known else address.url
        for _ in range(REDIRECTS + 1):
            own = address.headers if _same_server(target, address.url) else {}
            try:
                with self._connections.get(target, {"User-Agent": "framestream", **wanted, **own}, ticket) as response:
                    if response.status in REDIRECTING and "location" in response.headers:
                        target = _redirected(target, response.headers["location"])
                    elif known and response.status not in (206, 416):  # most likely no longer valid
                        self._moved.pop(address.url, None)
                        target, known = address.url, False
                    else:
                        part = _part(address, response, offset, size)
                        if target != address.url and not known:
                            if len(self._moved) >= KEPT_REDIRECTS:
                                self._moved.clear()
                            self._moved[address.url] = target, time.monotonic() + KEPT_REDIRECT
                        return part
            except (OSError, http.client.HTTPException) as error:
                raise _passing(error, address, ticket) from None
        raise ValueError(f"{address.shown}: the server redirects more than {REDIRECTS} times")


def _part(address: Address, response: http.client.HTTPResponse, offset: int, size: int) -> RangeResponse:
    """The body of an answer, checked."""
    headers, status = response.headers, response.status
    identity = headers.get("etag", "") or headers.get("last-modified", "")
    whole = content_total(headers)
    if status == 416 and 0 <= whole <= offset:  # nothing lies there, as in an empty file
        return RangeResponse(b"", whole, identity)
    _check(address, status, headers)
    if range_start(headers) != offset:
        raise RetryableError(ConnectionError, f"the server sent another part than byte {offset}")
    if whole == UNKNOWN:
        raise ValueError(f"{address.shown}: the server does not tell how large the file is")
    wanted = min(size, whole - offset)
    data = response.read(wanted)
    stated = parse_int(headers.get("content-length", ""))
    if len(data) != wanted or stated not in (UNKNOWN, wanted):
        raise RetryableError(ConnectionError, f"the server sent {len(data)} of {wanted} bytes")
    if not response.isclosed():
        response.read(1)  # the end of a body in chunks
    return RangeResponse(data, whole, identity)


def _check(address: Address, status: int, headers: Mapping[str, str]) -> None:
    """Raise unless the answer holds a part of the file as it is stored."""
    phrase = next((f" {known.phrase}" for known in HTTPStatus if known == status), "")
    said = f"the server answered {status}{phrase}"
    refused = f"{said}{address.login and '; '}{address.login}"
    if status == 206:
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise ValueError(f"{address.shown}: the server insists on sending it compressed ({encoding})")
        return
    if status == 200:
        fix = "serve the root by one that can, such as nginx or a bucket, or copy it"
        raise ValueError(f"{address.shown}: the server cannot send parts of a file; {fix}")
    if region := headers.get("x-amz-bucket-region", "") if status in (301, 307, 400) else "":
        raise ValueError(f"{address.shown}: the bucket is in region {region}; set AWS_REGION={region}")
    if status in (404, 410):
        raise RetryableError(FileNotFoundError, said, retries=0)
    if status in (401, 402, 407, 451):
        raise RetryableError(PermissionError, refused, retries=0)
    if status == 403:
        raise RetryableError(PermissionError, refused, retries=REFUSALS)
    if status in (408, 425, 429) or status >= 500:
        raise RetryableError(ConnectionError, said, wait=retry_after(headers))
    raise ValueError(f"{address.shown}: {said}")


def _redirected(before: str, to: str) -> str:
    """Where a redirect leads."""
    target = urljoin(before, to)
    schemes = urlsplit(before).scheme, urlsplit(target).scheme
    if schemes[1] not in ("http", "https") or schemes == ("https", "http") or not urlsplit(target).hostname:
        message = f"the server redirects from {schemes[0]}: to {schemes[1] or 'nowhere'}:"
        raise RetryableError(ConnectionError, message, retries=0)
    return target


def _passing(error: OSError | http.client.HTTPException, address: Address, ticket: Deadline) -> Exception:
    """A failed connection in one line that names no address, which could hold a password."""
    if ticket.left <= 0:
        return TimeoutError(f"{address.shown}: {ticket.late()}")
    if isinstance(error, TimeoutError):
        return RetryableError(TimeoutError, "the server said nothing for too long")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConnectionError(f"{address.shown}: the server's certificate is not good ({error.verify_message})")
    text = " ".join(str(error).split()) or type(error).__name__
    return RetryableError(ConnectionError, f"the connection broke ({text})")


def _same_server(a: str, b: str) -> bool:
    return a == b or urlsplit(a)[:2] == urlsplit(b)[:2]
