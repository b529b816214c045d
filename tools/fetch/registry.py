"""Places as a root map words them: ``dir:``, ``hf:``, ``url:``, ``page:``, ``s3://``, and archives in such places."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.fetch.archives.archive import open_archives
from framestream.tools.fetch.base import FetchError, MediaSource, RandomAccessFile
from framestream.tools.fetch.http.client import HttpClient, redacted
from framestream.tools.fetch.http.ranged_file import HttpFile
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.hub import open_hub
from framestream.tools.fetch.local import FolderSource, LocalFile
from framestream.tools.fetch.object_listing import name_order
from framestream.tools.fetch.s3 import open_s3
from framestream.tools.fetch.url import UrlSource
from framestream.tools.fetch.ytdlp import PageSource

FORMS = "dir:FOLDER, hf:OWNER/NAME:FOLDER, url:https://HOST/{path}, page:https://HOST/{stem} or s3://BUCKET/FOLDER"
FILES = "dir:PATH, hf:OWNER/NAME:PATH, url:https://HOST/PATH or s3://BUCKET/PATH"


def open_source(place: str | Mapping[str, Any], limits: FetchLimits, work: Path | None = None) -> MediaSource:
    """The source of a place: text, or ``{archives: FILES, join: BOOL, inside: FOLDER}`` for what is in archives.

    ``work`` is a folder where lists of what archives hold are kept. A hub place without a commit is looked up; the
    source's ``origin`` names the commit, and opening that instead gives the same files in another process or later.

    Raises:
        ValueError: one line that says what is wrong with the place.
        FetchError: the place cannot be asked, or needs a package that is not installed.
    """
    if not isinstance(place, str):
        return _open_archives(place, limits, work)
    kind, _, rest = place.partition(":")
    if kind == "dir":
        if not rest or not Path(rest).is_dir():
            raise ValueError(f"{place} is not a folder")
        return FolderSource(rest)
    if kind == "hf":
        return open_hub(place, limits)
    if kind == "s3":
        return open_s3(place, limits)
    if kind == "url":
        return UrlSource(rest, limits)
    if kind == "page":
        return PageSource(rest, limits)
    raise ValueError(f"{redacted(place)} cannot be read; give {FORMS}")


def check_archives(place: Mapping[str, Any]) -> None:
    """Refuse a mapping that does not say where archives are (ValueError with one line)."""
    files = place.get("archives")
    if unknown := sorted(set(map(str, place)) - {"archives", "join", "inside"}):
        raise ValueError(f"{unknown[0]}: unknown field; give archives, join and inside")
    if not files or not all(isinstance(file, str) for file in ([files] if isinstance(files, str) else files)):
        raise ValueError(f"archives: expected files such as {FILES}, or a list of them, got {files!r:.80}")
    if not isinstance(place.get("join", False), bool):
        raise ValueError(f"join: expected true for the parts of one archive, or false, got {place['join']!r:.80}")
    if not isinstance(place.get("inside", ""), str):
        raise ValueError(f"inside: expected a folder within the archives, got {place['inside']!r:.80}")


def _open_archives(place: Mapping[str, Any], limits: FetchLimits, work: Path | None) -> MediaSource:
    check_archives(place)
    files = open_files(place["archives"], limits)
    join, inside = place.get("join", False), place.get("inside", "")
    return open_archives(files, join, inside, work, limits.bytes, redact(place))


def redact(place: str | Mapping[str, Any]) -> str:
    """A place for tables and messages, without credentials."""
    if not isinstance(place, str):
        files = place.get("archives", ())
        return canonical_json(
            {**place, "archives": [redact(file) for file in ([files] if isinstance(files, str) else files)]}
        )
    kind, colon, rest = place.partition(":")
    return f"{kind}:{redacted(rest)}" if kind in ("url", "page") else place


def open_files(places: str | Sequence[str], limits: FetchLimits) -> list[RandomAccessFile]:
    """The files of one place or several, for reading archives: those of each place in the order of their names, with
    numbers as numbers. The last part of a place may hold the wildcards ``*``, ``?`` and ``[...]``, but not of url:.

    Raises:
        ValueError: one line that says what is wrong with a place.
        FetchError: missing_file where nothing matches, or the place cannot be asked.
    """
    found: list[RandomAccessFile] = []
    for place in [places] if isinstance(places, str) else places:
        files = _matching(place, limits)
        if not files:
            raise FetchError("missing_file", place, "no file matches")
        found += sorted(files, key=lambda file: name_order(file.name))
    return found


def _matching(place: str, limits: FetchLimits) -> list[RandomAccessFile]:
    kind, _, rest = place.partition(":")
    folder, slash, name = rest.rpartition("/")
    if kind == "url":
        return [HttpFile.open(HttpClient(limits), rest, f"url:{redacted(rest)}")]
    if kind not in ("dir", "hf", "s3"):
        raise ValueError(f"{redacted(place)} holds no archives; give {FILES}")
    if kind == "hf":
        head, colon, inner = rest.partition(":")
        folder, slash, name = f"{head}{colon}{inner.rpartition('/')[0]}", "/", inner.rpartition("/")[2]
    if not name or any(mark in folder for mark in "*?["):
        raise ValueError(f"{place}: name files, with wildcards in the last part of the path alone")
    if kind == "dir":
        parent = Path(folder + slash)
        if not parent.is_dir():
            raise FetchError("missing_file", place, f"{parent} is not a folder")
        found = [item for item in parent.iterdir() if item.name == name or fnmatch.fnmatchcase(item.name, name)]
        return [LocalFile(item) for item in found if item.is_file()]
    opened = open_hub(f"hf:{folder}", limits) if kind == "hf" else open_s3(f"s3:{folder}", limits)
    return opened.matching(name)
