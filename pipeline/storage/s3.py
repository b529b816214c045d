"""Buckets: ``s3://BUCKET/PATH``, read from addresses that botocore signs (``pip install -e '.[s3]'``)."""

from __future__ import annotations

import re
import time
from typing import Any

from framestream.pipeline.storage.http import Address

SIGNATURE_LIFETIME = 3600  #: seconds for which an object's address is signed
RESIGN_AFTER = 300  #: seconds after which it is signed again: botocore renews credentials longer before they expire
LOGIN = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class S3Addresses:
    """``s3://BUCKET/PATH``: botocore finds credentials, region and AWS_ENDPOINT_URL, and signs the addresses.

    Without credentials, requests are anonymous.
    """

    def __init__(self, root: str) -> None:
        found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*?))?/*", root)
        if not found:
            raise ValueError(f"{root}: not s3://BUCKET/PATH")
        self.display_url, self._bucket, self._folder = root.rstrip("/"), found[1], found[2] or ""
        self._client, self._error = _connect(self.display_url)
        self._signed: dict[str, tuple[Address, float]] = {}

    def address(self, name: str) -> Address:
        address, resign_at = self._signed.get(name, (None, 0.0))
        if address is None or time.monotonic() > resign_at:
            params = {"Bucket": self._bucket, "Key": f"{self._folder}/{name}" if self._folder else name}
            try:
                url = self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=SIGNATURE_LIFETIME)
            except self._error as error:  # credentials that cannot be renewed
                raise PermissionError(f"{self.display_url}/{name}: {error}; {LOGIN}") from None
            address = Address(url, f"{self.display_url}/{name}", login_hint=LOGIN)
            self._signed[name] = address, time.monotonic() + RESIGN_AFTER
        return address


def _connect(display_url: str) -> tuple[Any, type[Exception]]:
    """Return a botocore client and the class of its errors."""
    try:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError(f"{display_url}: reading buckets requires botocore: pip install -e '.[s3]'") from None
    try:
        session = botocore.session.get_session()
        signature = "s3v4" if session.get_credentials() else UNSIGNED
        region = session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", region_name=region, config=Config(signature_version=signature))
    except BotoCoreError as error:
        raise PermissionError(f"{display_url}: {error}; {LOGIN}") from None
    return client, BotoCoreError
