"""Buckets: ``s3://BUCKET/FOLDER``, through s3fs (``pip install -e '.[s3]'``).

s3fs lists folders and signs addresses, with credentials, region and AWS_ENDPOINT_URL as botocore finds them; without
credentials the bucket is asked as anybody. Files come through ``framestream.tools.fetch.http.client``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.retry import FetchLimits, TransientFetchError, with_retries
from framestream.tools.fetch.object_listing import ListedFile, ListedSource

LOGIN = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
SIGNED = 6 * 3600  #: seconds for which an address is signed, more than any file may take

T = TypeVar("T")


class S3Store:
    """A bucket (see ``framestream.tools.fetch.object_listing.Store``).

    Raises:
        FetchError: s3fs is not installed.
    """

    def __init__(self, name: str, limits: FetchLimits) -> None:
        try:
            import s3fs
        except ImportError:
            raise FetchError("unsupported", f"s3://{name}", "needs s3fs: pip install -e '.[s3]'") from None
        self._name, self._limits, self._s3fs = name, limits, s3fs
        self.http = HttpClient(limits, login=LOGIN)
        self._system = self._connect(anonymous=False)

    def files(self, folder: str) -> Iterator[tuple[str, ListedFile]]:
        """Name and item of each object directly in ``folder``, page by page."""
        prefix, page = f"{folder}/" if folder else "", ""
        while True:
            more = {"ContinuationToken": page} if page else {}
            query = {"Bucket": self._name, "Prefix": prefix, "Delimiter": "/", **more}
            answer = self._ask(lambda system, query=query: system.call_s3("list_objects_v2", **query), folder)
            for item in answer.get("Contents", ()):
                if name := item["Key"][len(prefix) :]:
                    yield name, _item(item)
            page = answer.get("NextContinuationToken", "")
            if not page:
                return

    def url(self, path: str) -> str:
        """Address of an object, signed where there are credentials."""
        return self._ask(lambda system: system.url(f"{self._name}/{path}", expires=SIGNED), path)

    def _connect(self, anonymous: bool) -> Any:
        stall = self._limits.stall
        settings = {"connect_timeout": stall, "read_timeout": stall, "retries": {"mode": "standard", "max_attempts": 1}}
        if not anonymous:
            settings["signature_version"] = "s3v4"
        system = self._s3fs.S3FileSystem(
            anon=anonymous, config_kwargs=settings, use_listings_cache=False, skip_instance_cache=True
        )
        system.retries = 1
        return system

    def _ask(self, call: Callable[[Any], T], path: str) -> T:
        """What s3fs answers; its failures as ours."""
        from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

        place = f"s3://{self._name}/{path}"

        def attempt(deadline: float) -> T:
            try:
                try:
                    return call(self._system)
                except NoCredentialsError:
                    self._system = self._connect(anonymous=True)
                    return call(self._system)
            except PartialCredentialsError:
                raise FetchError("denied", place, f"the credentials are not complete; {LOGIN}") from None
            except FileNotFoundError:
                raise FetchError("missing_file", place, "no such bucket or object") from None
            except PermissionError as error:
                raise FetchError("denied", place, f"{_line(error)}; {LOGIN}") from None
            except (OSError, BotoCoreError) as error:
                raise TransientFetchError("unreachable", _line(error)) from None

        return with_retries(attempt, place, self._limits)


def open_s3(place: str, limits: FetchLimits) -> ListedSource:
    """The source of ``s3://BUCKET/FOLDER``.

    Raises:
        ValueError: the place is not of this form.
        FetchError: s3fs is not installed.
    """
    found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*))?", place)
    if not found:
        raise ValueError(f"{place} is not s3://BUCKET/FOLDER")
    return ListedSource(place, S3Store(found[1], limits), found[2] or "")


def _item(item: dict[str, Any]) -> ListedFile:
    """An object of a listing. Its ETag names its contents; it is a checksum only of objects uploaded in one piece and
    without a key of the customer, which a listing does not tell."""
    return ListedFile(int(item["Size"]), item.get("ETag", "").strip('"'))


def _line(error: Exception) -> str:
    """An error of botocore without the addresses it may hold."""
    return re.sub(r"\"?https?://[^\s\"]+\"?", "the server", str(error)) or type(error).__name__
