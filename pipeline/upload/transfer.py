"""Upload files to a target: compare, refuse what would be lost, send in order, and compare again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from framestream.pipeline.upload.files import RefusedError, StoredFile, UploadError, UploadFile

#: files of users, which an upload that does not have them leaves as they are
USER_FILES = frozenset((".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt", "README.md"))

Progress = Callable[[int], object]  # is given the bytes that were sent


class UploadTarget(Protocol):
    """A place for uploaded files. Names are relative to it."""

    @property
    def display_url(self) -> str:
        """The address for messages, without credentials."""

    @property
    def is_atomic(self) -> bool:
        """Whether all files of the last call of ``send`` appear together."""

    def list_files(self, files: Sequence[UploadFile]) -> dict[str, StoredFile]:
        """Return all files of the target by name, with the digests needed to compare ``files``."""

    def read(self, name: str) -> bytes:
        """Return the contents of a small file."""

    def prepare(self) -> None:
        """Create the target if it is missing. Called before the first change."""

    def send(self, files: Sequence[UploadFile], deleted: Sequence[str], progress: Progress) -> None:
        """Upload ``files`` and remove the files ``deleted``."""


@dataclass(frozen=True, slots=True)
class TransferResult:
    """Files of a transfer, how many were sent now, and bytes."""

    files: int
    sent: int
    bytes: int
    sent_bytes: int


def transfer(
    stages: Sequence[Sequence[UploadFile]],
    target: UploadTarget,
    stored: Mapping[str, StoredFile],
    may_replace: Callable[[str], bool],
    replace: bool = False,
    fix: str = "name another address, or pass --replace to remove what is there",
) -> TransferResult:
    """Upload files, those of later stages after all of the earlier ones. The last file makes the whole readable.

    Args:
        stages: files to upload. Files with a copy in ``stored`` are not sent again.
        stored: what :meth:`UploadTarget.list_files` returned.
        may_replace: whether a file of this name may change in an upload of the same data.
        replace: remove or replace everything else but :data:`USER_FILES`.
        fix: what a refusal says that the user can do.

    Raises:
        RefusedError: other data are there, and not ``replace``.
        UploadError, OSError: it failed. Repeated, it continues.
    """
    files = {file.name: file for stage in stages for file in stage}
    different = {name for name, file in stored.items() if name not in files or not file.is_copy_of(files[name])}
    kept = USER_FILES - files.keys()
    lost = sorted(name for name in different - kept if not may_replace(name))
    if lost and not replace:
        more = f" and {len(lost) - 1:,} more files" if len(lost) > 1 else ""
        raise RefusedError(f"{target.display_url}: has other contents ({lost[0]!r:.100}{more}); {fix}")
    deleted = sorted(different - files.keys() - kept) if replace else []
    steps = [[file for file in stage if file.name not in stored or file.name in different] for stage in stages]
    if target.is_atomic:
        steps = [steps[0], [file for step in steps[1:] for file in step]]
    if any(steps) or deleted:
        target.prepare()
        last = stages[-1][-1]
        if last.name in stored and (lost or not target.is_atomic):
            target.send([], [last.name], lambda size: None)  # so that nobody reads a mixture
            deleted = [name for name in deleted if name != last.name]
            if last not in steps[-1]:
                steps[-1].append(last)
    sent = [file for step in steps for file in step]
    total = sum(file.size for file in sent)
    with tqdm(total=total, unit="B", unit_scale=True, desc="upload", disable=None, dynamic_ncols=True) as bar:
        for number, step in enumerate(steps):
            removed = deleted if number == len(steps) - 1 else []
            if step or removed:
                target.send(step, removed, bar.update)
    check_stored(files.values(), target, deleted)
    return TransferResult(len(files), len(sent), sum(f.size for f in files.values()), sum(f.size for f in sent))


def check_stored(files: Iterable[UploadFile], target: UploadTarget, deleted: Sequence[str] = ()) -> None:
    """Compare what is stored with ``files``, by size and digest.

    Raises:
        UploadError: a file is missing or differs, or one of ``deleted`` is still there.
    """
    files = list(files)
    stored = target.list_files(files)
    wrong = [file.name for file in files if file.name not in stored or not stored[file.name].is_copy_of(file)]
    wrong += [name for name in deleted if name in stored]
    if wrong:
        more = f" and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        fault = f"{wrong[0]!r:.100}{more} is not as it was sent"
        raise UploadError(f"{target.display_url}: {fault}; is something else writing there? run the command again")
