"""Files that clients sent, on the disk within a size bound."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from framestream.trainer.serving.errors import RequestError

CHUNK = 1 << 20  #: bytes that are copied at a time
MAX_NAME = 200  #: characters of a file's name that are kept


class ByteSource(Protocol):
    """What files are copied from."""

    def read(self, size: int = -1, /) -> bytes | None:
        """Return the next bytes; empty at the end."""


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """An uploaded file."""

    id: str
    name: str  #: as the client named it
    path: Path
    size: int  #: bytes
    digest: str  #: of the content
    created: int  #: seconds since 1970
    purpose: str = "user_data"

    def to_dict(self) -> dict[str, Any]:
        """Return the file object of the OpenAI API."""
        known = {"id": self.id, "object": "file", "bytes": self.size, "created_at": self.created}
        return {**known, "filename": self.name, "purpose": self.purpose, "status": "processed"}


@dataclass(frozen=True, slots=True)
class PrivateFile:
    """A file of one request, which removes it at its end; it stays readable if the upload is removed meanwhile."""

    path: Path
    digest: str  #: of the content
    size: int  #: bytes that count toward the bound; 0 for a link to an upload


class UploadStore:
    """Uploaded files by id, and the files of requests, in a temporary folder. Threads may share it.

    Above ``max_bytes``, the uploads that were not used for the longest time are removed.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes, self._lock = max_bytes, 0, threading.Lock()
        self._files: OrderedDict[str, UploadedFile] = OrderedDict()
        self._folder = Path(tempfile.mkdtemp(prefix="framestream-serve-"))

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    def add(self, copy: PrivateFile, name: str, purpose: str) -> UploadedFile:
        """Turn a file of a request, which :meth:`copy` returned, into an upload."""
        number = f"file-{secrets.token_hex(12)}"
        created = int(time.time())
        file = UploadedFile(number, name[:MAX_NAME] or "file", copy.path, copy.size, copy.digest, created, purpose)
        with self._lock:
            self._files[number] = file
        return file

    def get(self, number: str) -> UploadedFile:
        """Return an upload by its id.

        Raises:
            RequestError: no file has this number.
        """
        with self._lock:
            if number not in self._files:
                text = f"there is no file {number[:60]!r}, or it was removed to make room; upload it again"
                raise RequestError(404, text, "file_not_found", "file_id")
            self._files.move_to_end(number)
            return self._files[number]

    def files(self) -> list[UploadedFile]:
        """Return all uploads, the least recently used first."""
        with self._lock:
            return list(self._files.values())

    def remove(self, number: str) -> None:
        """Remove an upload. Requests that use it go on.

        Raises:
            RequestError: no file has this number.
        """
        self.get(number)
        with self._lock:
            if file := self._files.pop(number, None):
                self._discard(file.path, file.size)

    def link(self, number: str) -> PrivateFile:
        """Return an upload as a file of a request."""
        file = self.get(number)
        path = self._new_path()
        try:
            os.link(file.path, path)
        except FileNotFoundError:  # removed meanwhile
            self.get(number)
            raise
        return PrivateFile(path, file.digest, 0)

    def copy(self, source: ByteSource, param: str) -> PrivateFile:
        """Copy bytes to a file of a request.

        Raises:
            RequestError: there are none, or there is no room.
        """
        digest, path, size = hashlib.blake2b(digest_size=16), self._new_path(), 0
        try:
            with open(path, "xb") as target:
                while data := source.read(CHUNK):
                    self._reserve(len(data))
                    size += len(data)
                    digest.update(data)
                    target.write(data)
            if not size:
                raise RequestError(400, f"{param}: has no bytes", "empty_file", param)
        except OSError as error:
            with self._lock:
                self._discard(path, size)
            reason = f"the server cannot store the file ({error.strerror}); try again later"
            raise RequestError(503, reason, "no_space", param, retry_after=30) from None
        except BaseException:
            with self._lock:
                self._discard(path, size)
            raise
        return PrivateFile(path, digest.hexdigest(), size)

    def release(self, file: PrivateFile) -> None:
        """Remove a file of a request."""
        with self._lock:
            self._discard(file.path, file.size)

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new_path(self) -> Path:
        return self._folder / secrets.token_hex(16)

    def _reserve(self, size: int) -> None:
        """Count ``size`` bytes more, and remove old uploads to make room for them."""
        with self._lock:
            while self._bytes + size > self._max_bytes and self._files:
                _, oldest = self._files.popitem(last=False)
                self._discard(oldest.path, oldest.size)
            if self._bytes + size > self._max_bytes:
                raise RequestError(
                    503, "the server has no room for the file now; try later", "no_space", retry_after=30
                )
            self._bytes += size

    def _discard(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        self._bytes -= size
