"""Open the target at an address: ``hf://``, ``s3://``, ``gs://`` or ``az://``."""

from __future__ import annotations

import re
from urllib.parse import unquote

from framestream.pipeline.upload.files import RefusedError
from framestream.pipeline.upload.transfer import UploadTarget

TARGET_FORMS = (
    "hf://datasets/OWNER/NAME[@BRANCH][/PATH], hf://buckets/OWNER/NAME[/PATH], s3://BUCKET/PATH, gs://BUCKET/PATH "
    "or az://CONTAINER/PATH"
)
_NAME = r"[\w.-]+/[\w.-]+"
#: what people write for a data set or bucket: its web address, or its name
_NEAR = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:(?://)?)?(?:(datasets|buckets)/)?"
    rf"(?!(?:datasets|buckets|models|spaces|https?:)/)({_NAME})(?:/tree/.*)?/*",
    re.ASCII,
)


def open_target(url: str, private: bool | None = None) -> UploadTarget:
    """Return the target at an address of one of the :data:`TARGET_FORMS`.

    Args:
        private: create a repository or bucket of the hub as private, if it is missing; None for the owner's default.

    Raises:
        RefusedError: the address has another form, or the login is incomplete.
    """
    scheme, _, rest = url.partition("://")
    if any(part in (".", "..") for part in rest.split("/")) or not rest.isprintable():
        raise RefusedError(f"{url!r:.200}: has a part that no file can have; correct the address")
    if scheme in ("s3", "gs", "az"):
        from framestream.pipeline.upload.object_store import ObjectTarget  # obstore takes a while to import

        return ObjectTarget(url)
    if found := re.fullmatch(rf"hf://datasets/({_NAME})(?:@([^/\s]+))?(?:/(.*?))?/*", url, re.ASCII):
        from framestream.pipeline.upload.hub_repository import HubRepository

        return HubRepository(found[1], "dataset", unquote(found[2] or "main"), found[3] or "", private)
    if found := re.fullmatch(rf"hf://buckets/({_NAME})(?:/(.*?))?/*", url, re.ASCII):
        from framestream.pipeline.upload.hub_bucket import HubBucket

        return HubBucket(found[1], found[2] or "", private)
    found = _NEAR.fullmatch(url)
    meant = f"; did you mean hf://{found[1] or 'datasets'}/{found[2]}?" if found else ""
    raise RefusedError(f"{url.rpartition('@')[2]:.200}: not {TARGET_FORMS}{meant}")
