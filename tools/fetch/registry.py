"""Open the locations that a root map names: folders, hub repositories, web servers, buckets, and archives in them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.pipeline.utils.paths import missing_slash
from framestream.tools.fetch.archives.archive import open_archives
from framestream.tools.fetch.base import FetchError, MediaSource, RandomAccessFile
from framestream.tools.fetch.buckets import BUCKET_SCHEMES, open_bucket
from framestream.tools.fetch.http.client import HttpClient, redact_url
from framestream.tools.fetch.http.ranged_file import HttpFile
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.hub import open_hub
from framestream.tools.fetch.local import FolderSource, LocalFile
from framestream.tools.fetch.object_listing import name_order
from framestream.tools.fetch.url import UrlSource
from framestream.tools.fetch.ytdlp import PageSource

Location = str | Mapping[str, Any]  #: a value of a root map

SOURCE_FORMS = (
    "dir:FOLDER, links:FOLDER, hf:OWNER/NAME:FOLDER, url:https://HOST/{path}, page:https://HOST/{stem}, "
    "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or az://CONTAINER/FOLDER"
)
FILE_FORMS = (
    "dir:PATH, hf:OWNER/NAME:PATH, url:https://HOST/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"
)


def open_source(location: Location, limits: FetchLimits, member_lists: Path | None = None) -> MediaSource:
    """Return the source of a location.

    A hub location without a commit is resolved to one. The source's ``origin`` names the commit, and opening the origin
    gives the same files in another process or later.

    Args:
        location: text, or ``{archives: FILES, join: BOOL, inside: FOLDER}`` for files in archives.
        member_lists: folder that caches the lists of what archives contain.

    Raises:
        ValueError: one line that states what is wrong with the location.
        FetchError: the location cannot be read, or needs a package that is not installed.
    """
    if not isinstance(location, str):
        return _open_archives(location, limits, member_lists)
    scheme, _, rest = location.partition(":")
    if scheme in ("dir", "links"):
        if not rest or not Path(rest).is_dir():
            raise ValueError(f"{location} is not a folder")
        return FolderSource(rest, follow_links=scheme == "links")
    if scheme == "hf":
        return open_hub(location, limits)
    if scheme in BUCKET_SCHEMES:
        return open_bucket(location, limits)
    if scheme == "url":
        return UrlSource(rest, limits)
    if scheme == "page":
        return PageSource(rest, limits)
    prefix = "write url: before it, or " if scheme in ("http", "https") else ""
    raise ValueError(f"{redact(location)} is not a known kind of location; {prefix}use {SOURCE_FORMS}")


def check_archives(location: Mapping[str, Any]) -> None:
    """Check the fields of a mapping that names archives.

    Raises:
        ValueError: one line that names the field.
    """
    files = location.get("archives")
    if unknown := sorted(set(map(str, location)) - {"archives", "join", "inside"}):
        raise ValueError(f"{unknown[0]}: unknown field; the fields are archives, join and inside")
    if not files or not all(isinstance(file, str) for file in ([files] if isinstance(files, str) else files)):
        raise ValueError(f"archives: expected files such as {FILE_FORMS}, or a list of them, got {files!r:.80}")
    if not isinstance(location.get("join", False), bool):
        raise ValueError(f"join: expected true for the parts of one archive, or false, got {location['join']!r:.80}")
    if not isinstance(location.get("inside", ""), str):
        raise ValueError(f"inside: expected a folder within the archives, got {location['inside']!r:.80}")


def _open_archives(location: Mapping[str, Any], limits: FetchLimits, member_lists: Path | None) -> MediaSource:
    check_archives(location)
    files = open_files(location["archives"], limits)
    join, inside = location.get("join", False), location.get("inside", "")
    return open_archives(files, join, inside, member_lists, limits.bytes, redact(location))


def redact(location: Location) -> str:
    """Return a location as text without credentials, for tables and messages."""
    if not isinstance(location, str):
        files = location.get("archives", ())
        redacted = [redact(file) for file in ([files] if isinstance(files, str) else files)]
        return canonical_json({**location, "archives": redacted})
    scheme, colon, rest = location.partition(":")
    if scheme in ("http", "https"):
        return redact_url(location)
    return f"{scheme}:{redact_url(rest)}" if scheme in ("url", "page") else location


def open_files(locations: str | Sequence[str], limits: FetchLimits) -> Sequence[RandomAccessFile]:
    """Open the files of one or more locations, for reading archives.

    The files of each location are sorted by name, with numbers compared as numbers. The last part of a location may
    contain the wildcards ``*``, ``?`` and ``[...]``, except of ``url:``.

    Raises:
        ValueError: one line that states what is wrong with a location.
        FetchError: missing_file if nothing matches, or the location cannot be read.
    """
    opened: list[RandomAccessFile] = []
    for location in [locations] if isinstance(locations, str) else locations:
        files = _match_files(location, limits)
        if not files:
            raise FetchError("missing_file", location, "no file matches")
        opened += sorted(files, key=lambda file: name_order(file.name))
    return opened


def _match_files(location: str, limits: FetchLimits) -> Sequence[RandomAccessFile]:
    scheme, _, rest = location.partition(":")
    folder, slash, pattern = rest.rpartition("/")
    if address := missing_slash(rest if scheme == "url" else location):
        corrected = f"url:{redact_url(address)}" if scheme == "url" else address
        raise ValueError(f"a slash is missing in the address of an archive; write {corrected}")
    if scheme == "url":
        return [HttpFile.open(HttpClient(limits), rest, f"url:{redact_url(rest)}")]
    if scheme not in ("dir", "hf", *BUCKET_SCHEMES):
        prefix = "write url: before it, or " if scheme in ("http", "https") else ""
        raise ValueError(f"{redact(location)} cannot contain archives; {prefix}use {FILE_FORMS}")
    if scheme == "hf":
        repository, colon, path = rest.partition(":")
        folder, slash, pattern = f"{repository}{colon}{path.rpartition('/')[0]}", "/", path.rpartition("/")[2]
    if not pattern or any(mark in folder for mark in "*?["):
        raise ValueError(f"{location}: name files; only the last part of the path may contain wildcards")
    if scheme == "dir":
        parent = Path(folder + slash)
        if not parent.is_dir():
            raise FetchError("missing_file", location, f"{parent} is not a folder")
        items = [item for item in parent.iterdir() if item.name == pattern or fnmatch.fnmatchcase(item.name, pattern)]
        return [LocalFile(item) for item in items if item.is_file()]
    source = open_hub(f"hf:{folder}", limits) if scheme == "hf" else open_bucket(f"{scheme}:{folder}", limits)
    return source.open_matching(pattern)
