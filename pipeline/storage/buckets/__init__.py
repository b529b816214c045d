"""Buckets of Amazon S3, Google Cloud Storage and Azure through obstore: logins, signed addresses, listings."""

from __future__ import annotations

from framestream.pipeline.storage.buckets.logins import LOGIN_HINTS, NETWORK_HINTS
from framestream.pipeline.storage.buckets.processes import Bucket
from framestream.pipeline.storage.buckets.stores import (
    BUCKET_FORMS,
    SIGNATURE_LIFETIME,
    bucket_error_line,
    open_bucket_store,
)

__all__ = [
    "BUCKET_FORMS",
    "LOGIN_HINTS",
    "NETWORK_HINTS",
    "SIGNATURE_LIFETIME",
    "Bucket",
    "bucket_error_line",
    "open_bucket_store",
]
