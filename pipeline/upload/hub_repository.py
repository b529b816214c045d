"""Upload to a data set or model of the hub, in commits; the last one makes the whole readable."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from framestream.pipeline.upload.files import StoredFile, UploadFile, split_files
from framestream.pipeline.upload.hub_session import GROUP_BYTES, hub_errors, limit_hub_requests
from framestream.pipeline.upload.transfer import Progress

COMMIT_BYTES = 16 << 30  #: of a commit, so that a day's upload stays below the hub's limit of commits
COMMIT_FILES = 500


class HubRepository:
    """A folder of a repository of the hub. Login and endpoint are those of huggingface_hub.

    Args:
        name: ``OWNER/NAME``.
        kind: ``dataset`` or ``model``.
        revision: branch; it is created if it is missing.
        folder: path inside the repository.
        private: create the repository as private, if it is missing; None for the owner's default.
    """

    is_atomic = True

    def __init__(
        self, name: str, kind: str, revision: str = "main", folder: str = "", private: bool | None = None
    ) -> None:
        self.display_url = f"hf://{kind}s/{name}" + (f"@{revision}" if revision != "main" else "")
        self.display_url += f"/{folder}" if folder else ""
        self._name, self._kind, self._revision, self._private = name, kind, revision, private
        self._prefix = f"{folder}/" if folder else ""
        self._parent: str | None = None  # commit that the next one follows
        limit_hub_requests()
        self._api = HfApi(library_name="framestream")

    def list_files(self, files: Sequence[UploadFile]) -> dict[str, StoredFile]:
        with hub_errors(self.display_url):
            try:
                commit = self._head()
                entries = self._api.list_repo_tree(self._name, recursive=True, revision=commit, repo_type=self._kind)
                found = {
                    entry.path[len(self._prefix) :]: _stored(entry, self._prefix)
                    for entry in entries
                    if isinstance(entry, RepoFile) and entry.path.startswith(self._prefix)
                }
            except RepositoryNotFoundError:
                return {}  # a private one, too: creating it says so
        self._parent = commit
        return found

    def read(self, name: str) -> bytes:
        with hub_errors(self.display_url), tempfile.TemporaryDirectory() as folder:
            path = self._api.hf_hub_download(
                self._name, self._prefix + name, repo_type=self._kind, revision=self._parent, local_dir=folder
            )
            return Path(path).read_bytes()

    def prepare(self) -> None:
        with hub_errors(self.display_url):
            if self._parent is None:
                self._api.create_repo(self._name, repo_type=self._kind, private=self._private, exist_ok=True)
            if self._revision != "main":
                self._api.create_branch(self._name, branch=self._revision, repo_type=self._kind, exist_ok=True)

    def send(self, files: Sequence[UploadFile], deleted: Sequence[str], progress: Progress) -> None:
        batches = list(split_files(files, COMMIT_BYTES, COMMIT_FILES)) or [[]]
        for number, batch in enumerate(batches):
            removed = deleted if number == len(batches) - 1 else ()
            with hub_errors(self.display_url):
                self._commit(batch, removed, progress)

    def _commit(self, files: Sequence[UploadFile], deleted: Sequence[str], progress: Progress) -> None:
        additions = [
            CommitOperationAdd(
                self._prefix + file.name, str(file.source) if isinstance(file.source, Path) else file.source
            )
            for file in files
        ]
        first = 0
        for group in split_files(files, GROUP_BYTES, COMMIT_FILES):
            part = additions[first : first + len(group)]
            self._api.preupload_lfs_files(
                self._name, part, repo_type=self._kind, revision=self._revision, free_memory=False
            )
            first += len(group)
            progress(sum(file.size for file in group))
        removals = [CommitOperationDelete(self._prefix + name, is_folder=False) for name in deleted]
        summary = f"Upload {len(additions)} files" + (f", remove {len(removals)}" if removals else "")
        commit = self._api.create_commit(
            self._name,
            [*removals, *additions],
            commit_message=summary,
            repo_type=self._kind,
            revision=self._revision,
            parent_commit=self._parent,
        )
        self._parent = commit.oid

    def _head(self) -> str | None:
        """Return the commit of the branch; while the branch is missing, that of ``main``, where it will begin."""
        try:
            return self._api.repo_info(self._name, repo_type=self._kind, revision=self._revision).sha
        except RevisionNotFoundError:
            return self._api.repo_info(self._name, repo_type=self._kind).sha


def _stored(entry: RepoFile, prefix: str) -> StoredFile:
    digests = {"sha256": entry.lfs.sha256} if entry.lfs else {"git": entry.blob_id}
    return StoredFile(entry.path[len(prefix) :], entry.size, digests)
