"""What the status and the headers of an HTTP answer say (RFC 9110)."""

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

DENIED_RETRIES = 2  #: of 403, which means no, but is how some servers say that they are busy
ALGORITHMS = {"md5": "md5", "sha": "sha1", "sha-256": "sha256", "sha-512": "sha512"}  #: by their names in headers


@dataclass(frozen=True, slots=True)
class RemoteFileInfo:
    """What a server says about a file."""

    size: int  #: bytes, or UNKNOWN
    etag: str
    modified: str  #: Last-Modified
    ranges: bool  #: whether it can be read in parts

    @property
    def identity(self) -> str:
        """Another text when the contents are others, as far as the server tells."""
        return f"{self.etag or self.modified}-{self.size}"

    @property
    def validator(self) -> str:
        """For If-Range: a strong ETag, or else the date; empty if a changed file could not be told."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def same(self, other: RemoteFileInfo) -> bool:
        """Whether both describe one file unchanged."""
        sizes = self.size == other.size or UNKNOWN in (self.size, other.size)
        return sizes and (self.etag or self.modified) == (other.etag or other.modified)


def raise_for_status(response: httpx2.Response, place: object, login: str = "", expect: int = 0) -> None:
    """Raise unless the answer has a body that can be used.

    Args:
        login: what to do about a refusal, for the error line.
        expect: the only good status, where 200 and 206 are not both good.

    Raises:
        FetchError: missing_file, denied, unsupported, unreachable.
        Again: of a server that may be busy.
    """
    status = response.status_code
    phrase = next((f" {known.phrase}" for known in HTTPStatus if known == status), "")
    said = f"the server answered {status}{phrase}"
    refused = f"{said}{login and '; '}{login}"
    if status in (200, 206):
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            encoding = response.headers["content-encoding"]
            if not urlsplit(str(response.url)).path.endswith((".gz", ".tgz")) or "gzip" not in encoding:
                raise FetchError("unsupported", place, f"the server insists on sending it compressed ({encoding})")
        if expect and status != expect:
            raise FetchError("unsupported", place, "the server cannot send parts of a file; fetch it and map dir:PATH")
        return
    if status in (404, 410):
        raise FetchError("missing_file", place, said)
    if status in (401, 402, 407, 451):
        raise FetchError("denied", place, refused)
    if status == 403:
        raise TransientFetchError("denied", refused, retries=DENIED_RETRIES)
    if status in (408, 425, 429) or status >= 500:
        raise TransientFetchError("unreachable", said, wait=retry_after(response.headers))
    raise FetchError("unreachable", place, said)


def read_facts(response: httpx2.Response, size: int | None = None) -> RemoteFileInfo:
    """What the headers say about the whole file (``size``, if that is known better)."""
    headers = response.headers
    if size is None:
        size = content_total(headers) if response.status_code == 206 else parse_int(headers.get("content-length", ""))
    ranges = response.status_code == 206
    return RemoteFileInfo(size, headers.get("etag", ""), headers.get("last-modified", ""), ranges)


def digests(response: httpx2.Response) -> dict[str, str]:
    """Checksums of a whole file by its headers: Content-MD5, Digest (RFC 3230), Repr-Digest (RFC 9530), and the ETag
    of an S3 object that was uploaded in one piece and not encrypted with a customer's key."""
    headers = response.headers
    pairs = [("md5", headers["content-md5"])] if "content-md5" in headers else []
    for name in ("digest", "repr-digest", "x-goog-hash"):
        pairs += [tuple(part.strip().split("=", 1)) for part in headers.get(name, "").split(",") if "=" in part]
    found = {}
    for name, text in pairs:
        algorithm = ALGORITHMS.get(name.lower())
        try:
            value = base64.b64decode(text.strip(":"), validate=True).hex()
        except (binascii.Error, ValueError):
            continue
        if algorithm and len(value) == 2 * hashlib.new(algorithm, usedforsecurity=False).digest_size:
            found[algorithm] = value
    etag, encrypted = headers.get("etag", ""), headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    encrypted = encrypted or "x-amz-server-side-encryption-customer-algorithm" in headers
    if "x-amz-request-id" in headers and re.fullmatch(r'"[0-9a-f]{32}"', etag) and not encrypted:
        found["md5"] = etag.strip('"')
    return found
