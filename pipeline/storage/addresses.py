"""Resolve the files of a remote root to the addresses from which they are read."""

from __future__ import annotations

import os
from typing import Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from framestream.pipeline.storage.base import ReadOptions
from framestream.pipeline.storage.connections import basic_login
from framestream.pipeline.storage.http import Address

FORMS = (
    "https://HOST/PATH, http://HOST/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, "
    "hf://datasets/OWNER/NAME[@REVISION]/PATH or hf://buckets/OWNER/NAME/PATH"
)


class AddressResolver(Protocol):
    """A remote root whose files can be read over HTTP."""

    @property
    def display_url(self) -> str:
        """The root for messages, without a password."""

    def address(self, name: str) -> Address:
        """Return where the file ``name``, a path below the root, is read.

        Raises:
            OSError: the address cannot be determined, such as for expired credentials.
        """


def is_remote(root: str | os.PathLike[str]) -> bool:
    """Return whether ``root`` is an address rather than a folder."""
    return isinstance(root, str) and "://" in root


def open_resolver(root: str, options: ReadOptions) -> AddressResolver:
    """Open the remote root at an address of one of the :data:`FORMS`.

    Raises:
        ValueError: the address has another form.
        OSError: the hub does not have the repository, or cannot be reached, or the login of a bucket is incomplete.
    """
    scheme = root.partition("://")[0]
    if scheme in ("http", "https"):
        return WebAddresses(root)
    if scheme in ("s3", "gs", "az"):
        from framestream.pipeline.storage.bucket_addresses import BucketAddresses

        return BucketAddresses(root)
    if scheme == "hf":  # huggingface_hub takes a while to import
        from framestream.pipeline.storage.hub import HubAddresses, HubBucketAddresses

        return HubBucketAddresses(root) if root.startswith("hf://buckets/") else HubAddresses(root, options)
    raise ValueError(f"{root}: not {FORMS}")


class WebAddresses:
    """``https://HOST/PATH``, with ``USER:PASSWORD@`` before the host if the server requires a login."""

    def __init__(self, root: str) -> None:
        parts = urlsplit(root.rstrip("/"))
        if not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}: not {FORMS}")
        login = basic_login(parts)
        self._headers = {"Authorization": login} if login else {}
        self.display_url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def address(self, name: str) -> Address:
        url = f"{self.display_url}/{quote(name)}"
        return Address(url, url, self._headers)
