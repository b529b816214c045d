"""Addresses of the files of remote roots; those of web servers are here."""

from __future__ import annotations

import os
from typing import Protocol
from urllib.parse import quote, urlsplit, urlunsplit

from framestream.pipeline.storage.base import ReadOptions
from framestream.pipeline.storage.connections import basic_login
from framestream.pipeline.storage.http import Address

FORMS = "https://HOST/PATH, http://HOST/PATH, s3://BUCKET/PATH or hf://datasets/OWNER/NAME[@REVISION]/PATH"


class AddressResolver(Protocol):
    """A remote root."""

    shown: str  #: the root for messages, without a password

    def address(self, name: str) -> Address:
        """Where the file ``name`` is read."""


def is_remote(root: str | os.PathLike) -> bool:
    """Whether ``root`` is an address rather than a folder."""
    return isinstance(root, str) and "://" in root


def open_resolver(root: str, reading: ReadOptions) -> AddressResolver:
    """The remote root at an address of one of the forms above.

    Raises:
        ValueError: another form, or the extra that reads it is not installed.
        OSError: the hub does not have the repository, or cannot be reached.
    """
    kind = root.partition("://")[0]
    if kind in ("http", "https"):
        return WebAddresses(root)
    if kind == "s3":
        from framestream.pipeline.storage.s3 import S3Addresses

        return S3Addresses(root)
    if kind == "hf":
        from framestream.pipeline.storage.hub import HubAddresses  # huggingface_hub takes a while to import

        return HubAddresses(root, reading)
    raise ValueError(f"{root}: not {FORMS}")


class WebAddresses:
    """``https://HOST/PATH``, with ``USER:PASSWORD@`` before the host where the server wants them."""

    def __init__(self, root: str) -> None:
        parts = urlsplit(root.rstrip("/"))
        if not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}: not {FORMS}")
        login = basic_login(parts)
        self._headers = {"Authorization": login} if login else {}
        self.shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def address(self, name: str) -> Address:
        url = f"{self.shown}/{quote(name)}"
        return Address(url, url, self._headers)
