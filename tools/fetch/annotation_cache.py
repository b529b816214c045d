"""Cache of remote annotation files: each is fetched once into a local folder.

``DATA.CACHE/annotations/DIGEST/`` holds one file under its own name, and ``fetched.json`` with its origin, bytes and
checksum. The checksum is compared whenever the file is used. A file that has changed at its origin is not fetched
again. To choose the version that is read, name a revision (``hf:OWNER/NAME@REVISION:PATH``) or remove the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.utils.atomic_io import file_sha256, fsync_path
from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.pipeline.utils.paths import PathError, expand_path
from framestream.pipeline.utils.records import RecordError, read_record, write_record
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.host_health import SourcePool
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.registry import Location

#: Groups: the repository with its revision, and the path. A revision has no colon, so the first colon ends it.
HUB_FILE = re.compile(r"(hf:(?:(?:datasets|models)/)?[\w.-]+/[\w.-]+(?:@[^:]+)?):(.+)", re.ASCII)
#: The same file by its web address. Groups: OWNER/NAME, revision (may be missing), path; a query is ignored.
HUB_URL = re.compile(
    r"https?://(?:www\.)?huggingface\.co/datasets/([\w.-]+/[\w.-]+)/(?:(?:tree|blob|resolve|raw)/([^/]+)/)?([^?#]+)(?:[?#].*)?",
    re.ASCII,
)
RECORD = "fetched.json"

_FIX = "it is fetched again"

logger = logging.getLogger(__name__)


def remote_file(name: str) -> tuple[str, str] | None:
    """Return location and path of a remote annotation file, or None if ``name`` is a local path.

    Remote are hub files, also by their web address, other web addresses, and objects in buckets.
    """
    if match := HUB_FILE.fullmatch(name):
        return match[1], match[2]
    if match := HUB_URL.fullmatch(name):
        revision = "" if match[2] in (None, "main") else f"@{unquote(match[2])}"
        return f"hf:{match[1]}{revision}", unquote(match[3])
    if name.startswith(("s3://", "gs://", "az://")):
        location, _, path = name.rpartition("/")
        return location, path
    if name.startswith(("http://", "https://")):
        parts = urlsplit(name)
        folder, _, path = parts.path.rpartition("/")
        return "url:" + parts._replace(path=f"{folder}/{{name}}").geturl(), unquote(path)
    return None


def cache_folder(setting: str) -> Path:
    """Return the folder of ``data.cache``; ``~/.cache/framestream`` if the setting is empty."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "framestream"
    try:
        return Path(expand_path(str(setting or default)))
    except PathError as error:
        raise ManifestError(f"data.cache: {error}") from None


class AnnotationCache:
    """Fetched annotation files below ``folder``. Threads and processes may share it."""

    def __init__(self, folder: Path, sources: SourcePool, limits: FetchLimits) -> None:
        self._folder = folder / "annotations"
        self._sources, self._limits = sources, limits

    def fetch(self, location: Location, path: str) -> Path:
        """Return the local path of file ``path`` of ``location``; fetch it if it is not cached.

        Raises:
            FetchError: the file cannot be fetched.
            ValueError: the location is invalid.
            ManifestError: the folder cannot be written.
        """
        key = hashlib.sha256(canonical_json([location, path]).encode()).hexdigest()[:32]
        cached = self._folder / key / PurePosixPath(path).name
        if _is_intact(cached):
            return cached
        source = self._sources.source(location)
        try:
            size = self._sources.hosts.call(source.origin, lambda: source.find(path), max_failures=1)
        except FetchError as error:
            if path in str(error):
                raise
            # it names the folder that was listed
            raise FetchError(error.reason, f"{source.origin} {path}", error.message) from None
        if size is None:
            raise FetchError("missing_file", f"{source.origin} {path}", "there is no such file")
        try:
            with _exclusive_scratch(self._folder, key) as scratch:
                if _is_intact(cached):  # another process has fetched it in the meantime
                    return cached
                file = self._sources.source(location, self._limits).fetch(path, scratch)
                if not file.is_relative_to(scratch):
                    return file  # a local file is not copied
                _store(file, cached, {"place": source.origin, "path": path})
        except OSError as error:
            raise ManifestError(f"data.cache: {self._folder}: cannot be written ({error.strerror})") from None
        return cached


def _is_intact(cached: Path) -> bool:
    """Return whether a cached file exists and has the checksum that it was fetched with. The log names damage."""
    if not cached.parent.exists():
        return False
    try:
        record = read_record(cached.parent / RECORD, "record of a fetched file", _FIX)
        if record["sha256"] == file_sha256(cached).hex():
            return True
        reason = f"{cached}: damaged (its checksum differs)"
    except RecordError as error:
        reason = str(error).removesuffix(f"; {_FIX}")
    except (OSError, KeyError) as error:
        reason = f"{cached}: cannot be read back ({error!r})"
    logger.warning("%s; %s", reason, _FIX)
    return False


def _store(file: Path, cached: Path, record: dict[str, Any]) -> None:
    """Move a fetched file and its record to ``cached``.

    Its folder appears by one rename, so other processes never see a part of it.
    """
    renamed = file.rename(file.with_name(cached.name))
    record |= {"bytes": renamed.stat().st_size, "sha256": file_sha256(renamed).hex()}
    write_record(renamed.parent / RECORD, record)
    shutil.rmtree(cached.parent, ignore_errors=True)  # an earlier file that is damaged
    os.rename(renamed.parent, cached.parent)
    fsync_path(cached.parent.parent)


@contextmanager
def _exclusive_scratch(folder: Path, key: str) -> Iterator[Path]:
    """Yield an empty folder for ``key``, to one process at a time. What is left in it is removed at the end.

    The folder is below ``folder``, so that its contents can be renamed to their final path. The lock is an flock, which
    the system releases when a process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{key}.tmp"
    with open(folder / f"{key}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
