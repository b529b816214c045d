"""Upload to buckets of Amazon S3, Google Cloud Storage and Azure by obstore.

Each object has the SHA-256 of its bytes in its metadata, because stores state digests of their own for some objects
only. The sums that S3 keeps as ETags are compared as well, where an object has one.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import obstore
from obstore.exceptions import BaseError

from framestream.pipeline.storage.buckets import LOGIN_HINTS, NETWORK_HINTS, bucket_error_line, open_bucket_store
from framestream.pipeline.upload.files import RefusedError, StoredFile, UploadError, UploadFile
from framestream.pipeline.upload.transfer import Progress

FILES_AT_A_TIME = 4
PARTS_AT_A_TIME = 4  #: of each file
PART_BYTES = 8 << 20
MAX_PARTS = 9000  #: of an object; S3 allows 10,000
SHA256_FIELD = "sha256"  #: of an object's metadata
CONTROL_THREADS = 16  #: that ask for metadata


class ObjectTarget:
    """A folder of a bucket, ``s3://``, ``gs://`` or ``az://``. Login and endpoint come from the environment.

    Raises:
        RefusedError: the address is invalid, or the login is incomplete.
    """

    is_atomic = False

    def __init__(self, url: str) -> None:
        self.display_url = url.rstrip("/")
        try:
            self._store = open_bucket_store(url)
        except (ValueError, PermissionError) as error:
            raise RefusedError(str(error)) from None
        self._scheme = url.partition(":")[0]

    def list_files(self, files: Sequence[UploadFile]) -> dict[str, StoredFile]:
        sizes = {file.name: file.size for file in files}
        try:
            found = [item for page in obstore.list(self._store) for item in page]
            with ThreadPoolExecutor(CONTROL_THREADS) as pool:
                stored = list(pool.map(lambda item: self._stored(item, sizes.get(item["path"])), found))
        except BaseError as error:
            raise self._explain(error) from None
        return {file.name: file for file in stored}

    def _stored(self, item: Any, size: int | None) -> StoredFile:
        """Return an object of a listing, with its digests if it has the size of the file to compare it with."""
        digests: dict[str, str] = {}
        if item["size"] == size:
            head: Any = {"head": True}
            fields = obstore.get(self._store, item["path"], options=head).attributes
            if digest := fields.get(SHA256_FIELD):
                digests["sha256"] = digest
            else:  # another program has sent it
                etag = (item["e_tag"] or "").strip('"')
                digests |= {"md5": etag} if self._scheme == "s3" and re.fullmatch("[0-9a-f]{32}", etag) else {}
        return StoredFile(item["path"], item["size"], digests)

    def read(self, name: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, name).bytes())
        except BaseError as error:
            raise self._explain(error) from None

    def prepare(self) -> None:
        """Do nothing: buckets are not created here, because region and rights are the owner's to choose."""

    def send(self, files: Sequence[UploadFile], deleted: Sequence[str], progress: Progress) -> None:
        lock, stop = threading.Lock(), threading.Event()

        def report(size: int) -> None:
            with lock:
                progress(size)

        with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            results = [pool.submit(self._put, file, report, stop) for file in files]
            try:
                for result in results:
                    result.result()
            except BaseException as error:
                stop.set()
                for result in results:
                    result.cancel()
                if isinstance(error, BaseError):
                    raise self._explain(error) from None
                raise
        try:
            if deleted:
                obstore.delete(self._store, list(deleted))
        except BaseError as error:
            raise self._explain(error) from None

    def _put(self, file: UploadFile, progress: Progress, stop: threading.Event) -> None:
        """Send one file, and compare the sum that S3 states for it.

        Raises:
            UploadError: the file has changed while it was read, or S3 states another sum.
        """
        part = part_size(file.size)
        reader = _PartReader(file, part, progress, stop)
        attributes = {SHA256_FIELD: file.digest("sha256")}
        options: dict[str, Any] = {"attributes": attributes, "chunk_size": part, "max_concurrency": PARTS_AT_A_TIME}
        if file.size <= part:
            result = obstore.put(self._store, file.name, b"".join(reader), use_multipart=False, **options)
        else:
            try:
                result = obstore.put(self._store, file.name, iter(reader), **options)
            except Exception as error:
                raise (reader.error or error) from None
        etag = (result["e_tag"] or "").strip('"') if self._scheme == "s3" else ""
        found = re.fullmatch(r"([0-9a-f]{32})(-\d+)?", etag)
        if found and found[1] != reader.sum(multipart=found[2] is not None) and not self._reads_back(file):
            raise UploadError(f"{self.display_url}/{file.name}: has arrived with other bytes; run the command again")

    def _reads_back(self, file: UploadFile) -> bool:
        """Return whether the stored object has the bytes of ``file``: encrypted ones have ETags without meaning."""
        digest = hashlib.sha256()
        for block in obstore.get(self._store, file.name).stream():
            digest.update(block)
        return digest.hexdigest() == file.digest("sha256")

    def _explain(self, error: BaseError) -> Exception:
        line = bucket_error_line(error)
        found = re.search(r"status code: (\d{3})", line)
        status = found[1] if found else ""
        if isinstance(error, obstore.exceptions.NotFoundError) or status == "404":
            return RefusedError(f"{self.display_url}: no such bucket; create it first")
        refusals = obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError
        if isinstance(error, refusals) or status in ("401", "403"):
            return RefusedError(f"{self.display_url}: the bucket refuses ({line}); {LOGIN_HINTS[self._scheme]}")
        fix = "" if status else f"{NETWORK_HINTS[self._scheme]}, and "
        return UploadError(f"{self.display_url}: the upload failed ({line}); {fix}run the command again to continue")


def part_size(size: int) -> int:
    """Return the bytes of a part of an upload of ``size`` bytes."""
    mebibytes = -(-size // (MAX_PARTS << 20))
    return max(PART_BYTES, mebibytes << 20)


class _PartReader:
    """Read the parts of a file, count them, and check the file's SHA-256 at the end."""

    def __init__(self, file: UploadFile, part: int, progress: Progress, stop: threading.Event) -> None:
        self._file, self._part, self._progress, self._stop = file, part, progress, stop
        self._sums: list[bytes] = []
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        with self._file.open() as file:
            while data := file.read(self._part):
                if self._stop.is_set():
                    self.error = UploadError("stopped")
                    raise self.error
                digest.update(data)
                self._sums.append(hashlib.md5(data, usedforsecurity=False).digest())
                yield data
                self._progress(len(data))
        if digest.hexdigest() != self._file.digest("sha256"):
            self.error = UploadError(f"{self._file.name}: has changed while it was read; verify the root again")
            raise self.error

    def sum(self, multipart: bool) -> str:
        """Return the MD5 sum that an object of these parts has as its ETag."""
        if not multipart:
            return self._sums[0].hex() if self._sums else hashlib.md5(usedforsecurity=False).hexdigest()
        return hashlib.md5(b"".join(self._sums), usedforsecurity=False).hexdigest()
