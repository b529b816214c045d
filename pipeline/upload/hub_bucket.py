"""Upload to a bucket of the hub, ``hf://buckets/OWNER/NAME``, whose files are in Xet storage."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from framestream.pipeline.upload.files import StoredFile, UploadFile, split_files
from framestream.pipeline.upload.hub_session import GROUP_BYTES, hub_errors, limit_hub_requests
from framestream.pipeline.upload.transfer import Progress

BATCH_FILES = 500  #: that are sent at a time


class HubBucket:
    """A folder of a bucket of the hub. Login and endpoint are those of huggingface_hub.

    Args:
        name: ``OWNER/NAME``.
        folder: path inside the bucket.
        private: create the bucket as private, if it is missing; None for the owner's default.
    """

    is_atomic = False

    def __init__(self, name: str, folder: str = "", private: bool | None = None) -> None:
        self.display_url = f"hf://buckets/{name}" + (f"/{folder}" if folder else "")
        self._name, self._private = name, private
        self._prefix = f"{folder}/" if folder else ""
        limit_hub_requests()
        self._api = HfApi(library_name="framestream")

    def list_files(self, files: Sequence[UploadFile]) -> dict[str, StoredFile]:
        with hub_errors(self.display_url):
            try:
                entries = list(self._api.list_bucket_tree(self._name, self._prefix or None, recursive=True))
            except HfHubHTTPError as error:
                if error.response.status_code == 404:  # no such bucket or folder
                    return {}
                raise
        return {
            entry.path[len(self._prefix) :]: StoredFile(
                entry.path[len(self._prefix) :], entry.size, {"xet": entry.xet_hash}
            )
            for entry in entries
            if entry.type == "file" and entry.path.startswith(self._prefix)
        }

    def read(self, name: str) -> bytes:
        with hub_errors(self.display_url), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            self._api.download_bucket_files(self._name, [(self._prefix + name, path)], raise_on_missing_files=True)
            return path.read_bytes()

    def prepare(self) -> None:
        with hub_errors(self.display_url):
            self._api.create_bucket(self._name, private=self._private, exist_ok=True)

    def send(self, files: Sequence[UploadFile], deleted: Sequence[str], progress: Progress) -> None:
        with hub_errors(self.display_url):
            for group in split_files(files, GROUP_BYTES, BATCH_FILES):
                additions: list[tuple[str | Path | bytes, str]] = [
                    (file.source, self._prefix + file.name) for file in group
                ]
                self._api.batch_bucket_files(self._name, add=additions)
                progress(sum(file.size for file in group))
            if deleted:
                self._api.batch_bucket_files(self._name, delete=[self._prefix + name for name in deleted])
