"""Buckets as a source: ``s3://BUCKET/FOLDER``, ``gs://BUCKET/FOLDER`` and ``az://CONTAINER/FOLDER``.

obstore lists folders and signs URLs (``framestream.pipeline.storage.buckets``). Files are downloaded by
``framestream.tools.fetch.http.client``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from framestream.pipeline.storage.buckets import LOGIN_HINTS, Bucket
from framestream.pipeline.utils.paths import missing_slash
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.retry import FetchLimits, TransientFetchError, with_retries
from framestream.tools.fetch.object_listing import ListedFile, ListedSource

BUCKET_SCHEMES = ("s3", "gs", "az")

T = TypeVar("T")


class BucketStore:
    """A bucket (see :class:`framestream.tools.fetch.object_listing.ObjectStore`).

    Raises:
        FetchError: the login is incomplete, or the account is not named.
    """

    def __init__(self, location: str, limits: FetchLimits) -> None:
        self._limits = limits
        self._root = re.sub(r"(//[^/]+)/.*", r"\1", location)
        self._bucket = self._call(lambda: Bucket(self._root), self._root)
        self.http = HttpClient(limits, self._headers, LOGIN_HINTS[self._bucket.scheme])

    def files(self, folder: str) -> Iterator[tuple[str, ListedFile]]:
        """Yield each object directly in ``folder`` with its name.

        An ETag is a checksum only if the object was uploaded in one piece and without a key of the customer. A listing
        does not state that, so no checksum is passed on.
        """
        for item in self._call(lambda: self._bucket.files(folder), f"{self._root}/{folder}"):
            yield item.name, ListedFile(item.size, item.etag)

    def url(self, path: str) -> str:
        """Return the URL of an object, signed if there is a login."""
        return self._call(lambda: self._bucket.sign(path), f"{self._root}/{path}")

    def _headers(self) -> Mapping[str, str]:
        return self._call(self._bucket.headers, self._root)

    def _call(self, function: Callable[[], T], location: str) -> T:
        """Return what ``function`` returns; its errors become FetchErrors."""

        def attempt(deadline: float) -> T:
            try:
                return function()
            except FileNotFoundError as error:
                raise FetchError("missing_file", location, _text(error, location)) from None
            except PermissionError as error:
                raise FetchError("denied", location, _text(error, location)) from None
            except OSError as error:
                raise TransientFetchError("unreachable", _text(error, location)) from None
            except ValueError as error:  # a key that cannot be asked for
                raise FetchError("unsupported", location, _text(error, location)) from None

        return with_retries(attempt, location, self._limits)


def open_bucket(location: str, limits: FetchLimits) -> ListedSource:
    """Return the source of ``s3://BUCKET/FOLDER``, ``gs://BUCKET/FOLDER`` or ``az://CONTAINER/FOLDER``.

    Raises:
        ValueError: the location does not have this form.
        FetchError: the login is incomplete.
    """
    match = re.fullmatch(r"(?:s3|gs|az)://[A-Za-z0-9$][A-Za-z0-9._-]*(?:/(.*))?", location)
    if not match:
        meant = missing_slash(location)
        place = f"{location.partition(':')[0]}://{'CONTAINER' if location.startswith('az') else 'BUCKET'}/FOLDER"
        raise ValueError(
            f"a slash is missing after the colon; write {meant}" if meant else f"{location} is not {place}"
        )
    return ListedSource(location, BucketStore(location, limits), match[1] or "")


def _text(error: Exception, location: str) -> str:
    """Return the message of an error without the place that it begins with."""
    return str(error).removeprefix(f"{location.rstrip('/')}: ").removeprefix(f"{location}: ")
