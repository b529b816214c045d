"""Interpret the status and headers of an HTTP response (RFC 9110)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

import httpx2

from framestream.pipeline.storage.headers import content_total, parse_int, retry_after
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.http.retry import TransientFetchError

DENIED_RETRIES = 2  #: of status 403, which some servers also send when they are busy
ALGORITHMS = {"md5": "md5", "sha": "sha1", "sha-256": "sha256", "sha-512": "sha512"}  #: hashlib names by header names
NO_RANGES = "the server cannot send parts of a file; download it and map dir:PATH"


@dataclass(frozen=True, slots=True)
class RemoteFileInfo:
    """What a server states about a file."""

    size: int  #: bytes, or UNKNOWN
    etag: str
    modified: str  #: Last-Modified
    ranges: bool  #: whether the server sends parts of the file

    @property
    def identity(self) -> str:
        """Text that changes when the contents change, as far as the server states."""
        return f"{self.etag or self.modified}-{self.size}"

    @property
    def validator(self) -> str:
        """Value for If-Range: a strong ETag, or else the date. Empty if a change could not be detected."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def matches(self, other: RemoteFileInfo) -> bool:
        """Return whether both describe the same contents."""
        sizes_agree = self.size == other.size or UNKNOWN in (self.size, other.size)
        return sizes_agree and (self.etag or self.modified) == (other.etag or other.modified)


def raise_for_status(response: httpx2.Response, location: object, login_hint: str = "", expect: int = 0) -> None:
    """Raise an error unless the response has a usable body.

    Args:
        location: the file, for error messages.
        login_hint: what to do about a refusal, for error messages.
        expect: the only good status, if 200 and 206 are not both good.

    Raises:
        FetchError: missing_file, denied, unsupported, unreachable.
        TransientFetchError: the server may be busy.
    """
    status = response.status_code
    phrase = next((f" {known.phrase}" for known in HTTPStatus if known == status), "")
    message = f"the server answered {status}{phrase}"
    denied_message = f"{message}{login_hint and '; '}{login_hint}"
    if status in (200, 206):
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            encoding = response.headers["content-encoding"]
            # Some servers label stored .gz files with gzip as their encoding. Their bodies are the files themselves.
            if not urlsplit(str(response.url)).path.endswith((".gz", ".tgz")) or "gzip" not in encoding:
                raise FetchError("unsupported", location, f"the server sends the file only compressed ({encoding})")
        if expect and status != expect:
            raise FetchError("unsupported", location, NO_RANGES)
        return
    if status in (404, 410):
        raise FetchError("missing_file", location, message)
    if status in (401, 402, 407, 451):
        raise FetchError("denied", location, denied_message)
    if status == 403:
        raise TransientFetchError("denied", denied_message, retries=DENIED_RETRIES)
    if status in (408, 425, 429) or status >= 500:
        raise TransientFetchError("unreachable", message, wait=retry_after(response.headers))
    raise FetchError("unreachable", location, message)


def read_file_info(response: httpx2.Response, size: int | None = None) -> RemoteFileInfo:
    """Return what the headers state about the complete file.

    Args:
        size: bytes of the file, if they are known from elsewhere.
    """
    headers = response.headers
    if size is None:
        size = content_total(headers) if response.status_code == 206 else parse_int(headers.get("content-length", ""))
    ranges = response.status_code == 206
    return RemoteFileInfo(size, headers.get("etag", ""), headers.get("last-modified", ""), ranges)


def parse_digests(response: httpx2.Response) -> dict[str, str]:
    """Return the checksums of the complete file that the headers state, hexadecimal, by hashlib name.

    Read are Content-MD5, Digest (RFC 3230), Repr-Digest (RFC 9530) and x-goog-hash. The ETag of an S3 object is its MD5
    if the object was uploaded in one piece and is not encrypted with a key of the customer.
    """
    headers = response.headers
    pairs = [("md5", headers["content-md5"])] if "content-md5" in headers else []
    for header in ("digest", "repr-digest", "x-goog-hash"):
        for part in headers.get(header, "").split(","):
            name, equals, text = part.strip().partition("=")
            if equals:
                pairs.append((name, text))
    digests = {}
    for name, text in pairs:
        algorithm = ALGORITHMS.get(name.lower())
        try:
            value = base64.b64decode(text.strip(":"), validate=True).hex()
        except (binascii.Error, ValueError):
            continue
        if algorithm and len(value) == 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size:
            digests[algorithm] = value
    etag, encrypted = headers.get("etag", ""), headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    encrypted = encrypted or "x-amz-server-side-encryption-customer-algorithm" in headers
    if "x-amz-request-id" in headers and re.fullmatch(r'"[0-9a-f]{32}"', etag) and not encrypted:
        digests["md5"] = etag.strip('"')
    return digests
