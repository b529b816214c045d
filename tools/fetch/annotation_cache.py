"""Annotation files of other places, fetched once into a folder of this machine.

``DATA.CACHE/annotations/DIGEST/`` holds one file under its own name, and ``fetched.json``: where it is from, its bytes
and its checksum, which is compared whenever the file is used. A file that has changed at its place is not fetched
again; name a revision (``hf:OWNER/NAME@REVISION:PATH``) to be sure which one is read, or remove the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.utils.atomic_io import file_sha256, fsync_path, write_atomic
from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.host_health import SourcePool
from framestream.tools.fetch.http.retry import FetchLimits

HUB_FILE = re.compile(r"(hf:(?:(?:datasets|models)/)?[\w.-]+/[\w.-]+(?:@[^:]+)?):(.+)", re.ASCII)
HUB_ADDRESS = re.compile(
    r"https?://(?:www\.)?huggingface\.co/datasets/([\w.-]+/[\w.-]+)/(?:(?:tree|blob|resolve|raw)/([^/]+)/)?([^?#]+)(?:[?#].*)?",
    re.ASCII,
)
RECORD = "fetched.json"


def remote_file(name: str) -> tuple[str, str] | None:
    """Place and path of an annotation file that is somewhere else: a hub file, also by its web address, any other web
    address, or an object in a bucket. None for a local path."""
    if found := HUB_FILE.fullmatch(name):
        return found[1], found[2]
    if found := HUB_ADDRESS.fullmatch(name):
        revision = "" if found[2] in (None, "main") else f"@{unquote(found[2])}"
        return f"hf:{found[1]}{revision}", unquote(found[3])
    if name.startswith("s3://"):
        place, _, path = name.rpartition("/")
        return place, path
    if name.startswith(("http://", "https://")):
        parts = urlsplit(name)
        folder, _, path = parts.path.rpartition("/")
        return "url:" + parts._replace(path=f"{folder}/{{name}}").geturl(), unquote(path)
    return None


def cache_folder(given: str) -> Path:
    """The folder that ``data.cache`` names; ``~/.cache/framestream`` if it names none."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "framestream"
    return Path(given or default).expanduser()


class AnnotationCache:
    """The fetched files below ``folder``; threads and processes may share it."""

    def __init__(self, folder: Path, opened: SourcePool, limits: FetchLimits) -> None:
        self._folder = folder / "annotations"
        self._opened, self._limits = opened, limits

    def fetch(self, given: str | Mapping[str, Any], path: str) -> Path:
        """Where ``path`` of the place ``given``, a value of a root map, is on this machine now.

        Raises:
            FetchError: it cannot be had.
            ValueError: ``given`` is no place.
            ManifestError: the folder cannot be written.
        """
        key = hashlib.sha256(canonical_json([given, path]).encode()).hexdigest()[:32]
        kept = self._folder / key / PurePosixPath(path).name
        if _whole(kept):
            return kept
        source = self._opened.source(given)
        if self._opened.hosts.call(source.origin, lambda: source.find(path), patience=1) is None:
            raise FetchError("missing_file", f"{source.origin} {path}", "nothing at the path")
        try:
            with _alone(self._folder, key) as scratch:
                if _whole(kept):  # another process fetched it in the meantime
                    return kept
                file = self._opened.source(given, self._limits).fetch(path, scratch)
                if not file.is_relative_to(scratch):
                    return file  # on this machine already
                _keep(file, kept, {"place": source.origin, "path": path})
        except OSError as error:
            raise ManifestError(f"data.cache: {self._folder}: cannot be written ({error.strerror})") from None
        return kept


def _whole(kept: Path) -> bool:
    """Whether a kept file is there and has the checksum that it was fetched with."""
    try:
        return json.loads((kept.parent / RECORD).read_bytes())["sha256"] == file_sha256(kept).hex()
    except (OSError, ValueError, KeyError):
        return False


def _keep(file: Path, kept: Path, record: dict[str, Any]) -> None:
    """Move a fetched file to its place, which appears whole."""
    named = file.rename(file.with_name(kept.name))
    record |= {"bytes": named.stat().st_size, "sha256": file_sha256(named).hex()}
    write_atomic(named.parent / RECORD, canonical_json(record).encode())
    shutil.rmtree(kept.parent, ignore_errors=True)  # one that has been damaged
    os.rename(named.parent, kept.parent)
    fsync_path(kept.parent.parent)


@contextmanager
def _alone(folder: Path, key: str) -> Iterator[Path]:
    """An empty folder beside the final one, for one process at a time; what is left in it is removed."""
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
