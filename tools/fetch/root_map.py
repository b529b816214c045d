"""Where annotation files and media really are: local folders, the user's root map, and the hub.

The published recipe names web pages as roots. A root map (``data.roots``, a YAML file) says where their contents lie;
its keys are an entry's name, an entry's root or, for annotation files, ``hf:OWNER/NAME``::

    https://github.com/m-bain/webvid: dir:/data/webvid
    https://huggingface.co/datasets/lmms-lab/M4-Instruct-Data: hf:lmms-lab/M4-Instruct-Data

Places that are no folder of this machine are opened by :func:`framestream.tools.fetch.registry.open_source`. Annotation files of such
places, and of web addresses, buckets and the hub without any root map, are fetched (``tools/fetch/annotation_cache.py``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from framestream.pipeline.config.data import DataConfig, EntryConfig
from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.yaml_files import read_yaml
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.tools.fetch.annotation_cache import AnnotationCache, cache_folder, remote_file
from framestream.tools.fetch.base import FetchError, MediaSource
from framestream.tools.fetch.host_health import SourcePool
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.registry import check_archives, open_files, open_source, redact

THREADS = 8  #: places opened and annotation files fetched at once

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ResolvedLocation:
    """Something that an entry needs: where it is, or why it is not there (one line with the fix)."""

    path: Path | None  #: on this machine; None for a place elsewhere
    origin: str  #: what it is read from, or would come from
    missing: str = ""
    name: str = ""  #: what the manifest and the root map call it; part of a media item's identity
    spec: str | Mapping[str, Any] = ""  #: opens it: a value of a root map, a hub repository's with its commit
    limits: FetchLimits = FetchLimits()
    member_lists: Path | None = None  #: folder where lists of what archives hold are kept

    @property
    def resolved(self) -> bool:
        """Whether the place is known; what is in it may still be missing."""
        return not self.missing

    def open(self) -> MediaSource:
        """The files below it, for places that are resolved.

        Raises:
            FetchError: the place cannot be asked, or is none.
        """
        try:
            return open_source(self.spec, self.limits, self.member_lists)
        except ValueError as error:
            raise FetchError("unresolved", self.name, str(error)) from None


class RootMap:
    """The root map of a manifest; a manifest without one has only local folders."""

    def __init__(self, data: DataConfig, limits: FetchLimits, quick: FetchLimits) -> None:
        self._file = data.roots
        self._opened = SourcePool(quick)
        self._cache = cache_folder(data.cache)
        self._annotations = AnnotationCache(self._cache, self._opened, limits)
        self._map: dict[str, str | dict[str, Any]] = {}
        if data.roots:
            if not Path(data.roots).is_file():
                raise ManifestError(f"data.roots: {data.roots}: no such file; name your root map, or none")
            for name, place in read_yaml(data.roots).items():
                if not isinstance(place, (str, dict)):
                    where = f"data.roots: {data.roots}: {name}"
                    raise ManifestError(f"{where}: expected text such as dir:/path or a mapping, got {place!r}")
                self._map[str(name)] = place

    def annotation(self, entry: EntryConfig) -> ResolvedLocation:
        """The entry's annotation file, on this machine."""
        name, far = entry.annotation, remote_file(entry.annotation)
        if not far:
            if not Path(name).is_file():
                return ResolvedLocation(
                    None, name, f"{name}: no such annotation file; correct data.entries or fetch it"
                )
            return ResolvedLocation(Path(name), name)
        place, path = far
        hub = place.partition("@")[0] if place.startswith("hf:") else ""
        mapped = next((key for key in (place, hub) if key in self._map), "")
        given = self._map[mapped] if mapped else place
        if isinstance(given, str) and given.startswith("dir:"):
            folder = self._place(mapped)
            file = folder.path and folder.path / path
            if file and not file.is_file():
                return ResolvedLocation(None, folder.origin, f"{file}: no such annotation file")
            return ResolvedLocation(file, folder.origin, folder.missing)
        try:
            return ResolvedLocation(self._annotations.fetch(given, path), mapped or name)
        except ManifestError:
            raise
        except (FetchError, ValueError) as error:
            fix = f"fetch it and map {hub} to dir:FOLDER{self._where}" if hub else "fetch it and name the local file"
            return ResolvedLocation(None, name, f"the annotation file is not on this machine: {error}; {fix}")

    def media(self, entry: EntryConfig) -> ResolvedLocation:
        """The place that the entry's media paths are relative to; a folder without links."""
        for name in (entry.name, entry.root):
            if name and name in self._map:
                return self._place(name)
        if not entry.root:
            return ResolvedLocation(None, "", "the entry has media but no root; set its root to their folder")
        if "://" in entry.root or entry.root.startswith("hf:"):
            fix = f"map the root to a place{self._where}, see manifests/roots.example.yaml{self._near(entry.root)}"
            return ResolvedLocation(None, entry.root, f"the root is not a folder on this machine; {fix}")
        if not Path(entry.root).is_dir():
            fix = f"correct the entry's root{f', or map it{self._where}' if self._file else ''}{self._near(entry.root)}"
            return ResolvedLocation(None, entry.root, f"{entry.root}: no such folder; {fix}")
        return _folder(Path(entry.root), entry.root, entry.root)

    def _place(self, name: str) -> ResolvedLocation:
        """What the root map says of ``name``."""
        given, limits = self._map[name], self._opened.limits
        if not isinstance(given, str):  # archives, which take long to open
            return self._archives(name, given)
        if given.startswith("dir:"):
            folder = Path(given[len("dir:") :])
            if not folder.is_dir():
                return ResolvedLocation(None, given, f"{self._file}: {name}: {folder} is not a folder")
            return _folder(folder, given, name)
        try:
            origin = self._opened.source(given).origin
        except ValueError as error:
            raise ManifestError(f"data.roots: {self._file}: {name}: {error}") from None
        except FetchError as error:
            return ResolvedLocation(None, given, f"{self._file}: {name}: {error}", name)
        return ResolvedLocation(None, origin, "", name, origin if given.startswith("hf:") else given, limits)

    def _archives(self, name: str, given: Mapping[str, Any]) -> ResolvedLocation:
        """Archives that are there, at the commits that their hub repositories are at now."""
        try:
            check_archives(given)
            files = [given["archives"]] if isinstance(given["archives"], str) else given["archives"]
            pinned = {**given, "archives": [self._pinned(file) for file in files]}
            open_files(pinned["archives"], self._opened.limits)
        except ValueError as error:
            raise ManifestError(f"data.roots: {self._file}: {name}: {error}") from None
        except FetchError as error:
            return ResolvedLocation(None, redact(given), f"{self._file}: {name}: {error}", name)
        lists = self._cache / "archives"
        try:
            lists.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ManifestError(f"data.cache: {lists}: cannot be made ({error.strerror})") from None
        return ResolvedLocation(None, redact(pinned), "", name, pinned, self._opened.limits, lists)

    def _pinned(self, file: str) -> str:
        if not file.startswith("hf:"):
            return file
        repository, _, path = file.removeprefix("hf:").partition(":")
        return self._opened.source(f"hf:{repository}:").origin + path

    @property
    def _where(self) -> str:
        return f" in {self._file or 'a YAML file named by data.roots'}"

    def _near(self, name: str) -> str:
        """Names the key that is ``name`` but for small letters and slashes at its ends."""
        near = (key for key in self._map if key.strip("/").casefold() == name.strip("/").casefold())
        return next((f"; it has `{key}`" for key in near), "")


def _folder(path: Path, origin: str, name: str) -> ResolvedLocation:
    real = os.path.realpath(path)
    return ResolvedLocation(Path(real), origin, "", name, f"dir:{real}")


@dataclass(frozen=True, slots=True)
class ResolvedEntry:
    """An entry with its number, its unique name, and the places of its annotation file and media."""

    number: int
    entry: EntryConfig
    annotation: ResolvedLocation
    media: ResolvedLocation


def resolve_entries(manifest: Manifest, quick: bool = False) -> list[ResolvedEntry]:
    """The manifest's entries in order; a name that an earlier entry has gets ``~2``, ``~3`` ... appended.

    Args:
        quick: give up places that do not answer within seconds.

    Raises:
        ManifestError: the root map cannot be used.
    """
    limits = FetchLimits.from_manifest(manifest.data)
    roots = RootMap(manifest.data, limits, replace(limits, retries=1, stall=5.0) if quick else limits)
    entries = manifest.data.entries
    media = _in_threads(roots.media, entries, "places")
    annotations = _in_threads(roots.annotation, entries, "annotation files")
    seen, found = Counter(), []
    for number, (entry, annotation, place) in enumerate(zip(entries, annotations, media, strict=True)):
        seen[entry.name] += 1
        if seen[entry.name] > 1:
            entry = replace(entry, name=f"{entry.name}~{seen[entry.name]}")
        found.append(ResolvedEntry(number, entry, annotation, place))
    return found


def _in_threads(call: Callable[[EntryConfig], T], entries: tuple[EntryConfig, ...], what: str) -> list[T]:
    with DaemonThreadPool(THREADS) as threads:
        return list(tqdm(threads.map(call, entries), desc=what, total=len(entries), disable=None, leave=False))
