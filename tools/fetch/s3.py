"""Buckets as a source: ``s3://BUCKET/FOLDER``, through s3fs (``pip install -e '.[s3]'``).

s3fs lists folders and signs URLs, with credentials, region and AWS_ENDPOINT_URL as botocore finds them. Without
credentials, requests are anonymous. Files are downloaded by ``framestream.tools.fetch.http.client``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from framestream.pipeline.utils.paths import missing_slash
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.retry import FetchLimits, TransientFetchError, with_retries
from framestream.tools.fetch.object_listing import ListedFile, ListedSource

LOGIN_HINT = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
SIGNATURE_TTL = 6 * 3600  #: seconds for which a signed URL is valid, longer than any download may take

T = TypeVar("T")


class S3Store:
    """A bucket (see :class:`framestream.tools.fetch.object_listing.ObjectStore`).

    Raises:
        FetchError: s3fs is not installed.
    """

    def __init__(self, name: str, limits: FetchLimits) -> None:
        try:
            import s3fs
        except ImportError:
            raise FetchError("unsupported", f"s3://{name}", "needs s3fs: pip install -e '.[s3]'") from None
        self._name, self._limits, self._s3fs = name, limits, s3fs
        self.http = HttpClient(limits, login_hint=LOGIN_HINT)
        self._filesystem = self._connect(anonymous=False)

    def files(self, folder: str) -> Iterator[tuple[str, ListedFile]]:
        """Yield each object directly in ``folder`` with its name, page by page."""
        prefix, page = f"{folder}/" if folder else "", ""
        while True:
            continuation = {"ContinuationToken": page} if page else {}
            query = {"Bucket": self._name, "Prefix": prefix, "Delimiter": "/", **continuation}
            answer = self._call(functools.partial(_list_objects, query=query), folder)
            for item in answer.get("Contents", ()):
                if name := item["Key"][len(prefix) :]:
                    yield name, _listed_file(item)
            page = answer.get("NextContinuationToken", "")
            if not page:
                return

    def url(self, path: str) -> str:
        """Return the URL of an object, signed if there are credentials."""
        return self._call(lambda filesystem: filesystem.url(f"{self._name}/{path}", expires=SIGNATURE_TTL), path)

    def _connect(self, anonymous: bool) -> Any:
        stall = self._limits.stall
        settings = {"connect_timeout": stall, "read_timeout": stall, "retries": {"mode": "standard", "max_attempts": 1}}
        if not anonymous:
            settings["signature_version"] = "s3v4"
        filesystem = self._s3fs.S3FileSystem(
            anon=anonymous, config_kwargs=settings, use_listings_cache=False, skip_instance_cache=True
        )
        filesystem.retries = 1  # retries are made by with_retries
        return filesystem

    def _call(self, function: Callable[[Any], T], path: str) -> T:
        """Return what ``function`` returns for the s3fs file system; its errors become FetchErrors."""
        from botocore.exceptions import NoCredentialsError, PartialCredentialsError

        location = f"s3://{self._name}/{path}"

        def attempt(deadline: float) -> T:
            try:
                try:
                    return function(self._filesystem)
                except NoCredentialsError:
                    self._filesystem = self._connect(anonymous=True)
                    return function(self._filesystem)
            except PartialCredentialsError:
                raise FetchError("denied", location, f"the credentials are incomplete; {LOGIN_HINT}") from None
            except FileNotFoundError:
                raise FetchError("missing_file", location, "no such bucket or object") from None
            except PermissionError as error:
                raise FetchError("denied", location, f"{_error_line(error)}; {LOGIN_HINT}") from None
            except Exception as error:  # s3fs, botocore and aiohttp have no common class of errors
                raise TransientFetchError("unreachable", _error_line(error)) from None

        return with_retries(attempt, location, self._limits)


def open_s3(location: str, limits: FetchLimits) -> ListedSource:
    """Return the source of ``s3://BUCKET/FOLDER``.

    Raises:
        ValueError: the location does not have this form.
        FetchError: s3fs is not installed.
    """
    match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", location)
    if not match:
        meant = missing_slash(location)
        fix = f"a slash is missing after the colon; write {meant}" if meant else f"{location} is not s3://BUCKET/FOLDER"
        raise ValueError(fix)
    return ListedSource(location, S3Store(match[1], limits), match[2] or "")


def _list_objects(filesystem: Any, query: dict[str, str]) -> dict[str, Any]:
    return filesystem.call_s3("list_objects_v2", **query)


def _listed_file(item: dict[str, Any]) -> ListedFile:
    """Return an object of a listing, with its ETag as identity.

    An ETag is a checksum only if the object was uploaded in one piece and without a key of the customer. A listing does
    not state that, so no checksum is passed on.
    """
    return ListedFile(int(item["Size"]), item.get("ETag", "").strip('"'))


def _error_line(error: Exception) -> str:
    """Return the message of a botocore error without URLs, which may hold credentials."""
    return re.sub(r"\"?https?://[^\s\"]+\"?", "the server", str(error)) or type(error).__name__
