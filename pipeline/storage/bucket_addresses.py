"""Addresses of roots in buckets: ``s3://BUCKET/PATH``, ``gs://BUCKET/PATH`` and ``az://CONTAINER/PATH``."""

from __future__ import annotations

import time

from framestream.pipeline.storage.buckets import LOGIN_HINTS, NETWORK_HINTS, SIGNATURE_LIFETIME, Bucket
from framestream.pipeline.storage.http import Address

#: seconds after which an address of S3, or one that is read with a token, is made again: it ends with temporary keys or
#: the token, which are renewed longer before
RESIGN_TEMPORARY = 180.0
RESIGN_OTHERS = SIGNATURE_LIFETIME.total_seconds() / 2  #: signing may ask the cloud, and the address lives on its own


class BucketAddresses:
    """A root in a bucket. Its addresses are signed if there is a login, and signed again before they expire.

    Raises:
        ValueError: the address has another form.
        PermissionError: the login is incomplete, or the account is not named.
    """

    def __init__(self, root: str) -> None:
        self._bucket = Bucket(root)
        self.display_url = root.rstrip("/")
        self._signed: dict[str, tuple[Address, float]] = {}

    def address(self, name: str) -> Address:
        address, resign_at = self._signed.get(name, (None, 0.0))
        if address is None or time.monotonic() > resign_at:
            url, headers = self._bucket.sign(f"{self._bucket.folder}/{name}".lstrip("/")), self._bucket.headers()
            hints = LOGIN_HINTS[self._bucket.scheme], NETWORK_HINTS[self._bucket.scheme]
            address = Address(url, f"{self.display_url}/{name}", headers, *hints)
            lifetime = RESIGN_TEMPORARY if headers or self._bucket.scheme == "s3" else RESIGN_OTHERS
            self._signed[name] = address, time.monotonic() + lifetime
        return address
