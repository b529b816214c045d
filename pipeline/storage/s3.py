"""Buckets: ``s3://BUCKET/PATH``, by addresses that botocore signs (``pip install -e '.[s3]'``)."""

from __future__ import annotations

import re
import time
from typing import Any

from framestream.pipeline.storage.http import Address

SIGNED = 3600  #: seconds for which an object's address is signed
SIGNED_AGAIN = 300  #: seconds after which it is signed anew: botocore renews credentials longer before they end
LOGIN = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class S3Addresses:
    """``s3://BUCKET/PATH``: botocore signs the addresses, with credentials, region and AWS_ENDPOINT_URL as it finds
    them; without credentials the bucket is asked as anybody."""

    def __init__(self, root: str) -> None:
        found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*?))?/*", root)
        if not found:
            raise ValueError(f"{root}: not s3://BUCKET/PATH")
        self.shown, self._bucket, self._folder = root.rstrip("/"), found[1], found[2] or ""
        self._client, self._failure = _connect(self.shown)
        self._signed: dict[str, tuple[Address, float]] = {}

    def address(self, name: str) -> Address:
        address, until = self._signed.get(name, (None, 0.0))
        if address is None or time.monotonic() > until:
            where = {"Bucket": self._bucket, "Key": f"{self._folder}/{name}" if self._folder else name}
            try:
                url = self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=SIGNED)
            except self._failure as error:  # credentials that cannot be renewed
                raise PermissionError(f"{self.shown}/{name}: {error}; {LOGIN}") from None
            address = Address(url, f"{self.shown}/{name}", login=LOGIN)
            self._signed[name] = address, time.monotonic() + SIGNED_AGAIN
        return address


def _connect(shown: str) -> tuple[Any, type[Exception]]:
    """A client of botocore, and the kind of its errors."""
    try:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError(f"{shown}: reading buckets needs botocore: pip install -e '.[s3]'") from None
    try:
        session = botocore.session.get_session()
        signature = "s3v4" if session.get_credentials() else UNSIGNED
        region = session.get_config_variable("region") or "us-east-1"
        client = session.create_client("s3", region_name=region, config=Config(signature_version=signature))
    except BotoCoreError as error:
        raise PermissionError(f"{shown}: {error}; {LOGIN}") from None
    return client, BotoCoreError
