"""Buckets: ``s3://BUCKET/PATH``, by addresses that botocore signs (``pip install -e '.[s3]'``)."""

from __future__ import annotations

import re
import time
from typing import Any

from pipeline.storage.http import Address

SIGNED = 6 * 3600  #: seconds for which an object's address is signed
SIGNED_AGAIN = SIGNED / 2  #: seconds after which it is signed anew
LOGIN = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class Bucket:
    """``s3://BUCKET/PATH``: botocore signs the addresses, with credentials, region and AWS_ENDPOINT_URL as it finds
    them; without credentials the bucket is asked as anybody."""

    def __init__(self, root: str) -> None:
        found = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/(.*?))?/*", root)
        if not found:
            raise ValueError(f"{root}: not s3://BUCKET/PATH")
        self.shown, self._bucket, self._folder = root.rstrip("/"), found[1], found[2] or ""
        self._client = _s3_client(self.shown)
        self._signed: dict[str, tuple[Address, float]] = {}

    def address(self, name: str) -> Address:
        address, until = self._signed.get(name, (None, 0.0))
        if address is None or time.monotonic() > until:
            where = {"Bucket": self._bucket, "Key": f"{self._folder}/{name}" if self._folder else name}
            url = self._client.generate_presigned_url("get_object", Params=where, ExpiresIn=SIGNED)
            address = Address(url, f"{self.shown}/{name}", login=LOGIN)
            self._signed[name] = address, time.monotonic() + SIGNED_AGAIN
        return address


def _s3_client(shown: str) -> Any:
    try:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise ValueError(f"{shown}: reading buckets needs botocore: pip install -e '.[s3]'") from None
    try:
        session = botocore.session.get_session()
        credentials = session.get_credentials()
        return session.create_client(
            "s3",
            region_name=session.get_config_variable("region") or "us-east-1",
            config=Config(signature_version="s3v4" if credentials else UNSIGNED),
        )
    except BotoCoreError as error:
        raise ValueError(f"{shown}: {error}; {LOGIN}") from None
