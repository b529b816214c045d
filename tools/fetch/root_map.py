"""Resolve where annotation files and media are: local folders, the user's root map, and the hub.

The published recipe names web pages as roots. A root map (``data.roots``, a YAML file) names where their contents are.
Its keys are the name of an entry, the root of an entry or, for annotation files, ``hf:OWNER/NAME``::

    https://github.com/m-bain/webvid: dir:/data/webvid
    https://huggingface.co/datasets/lmms-lab/M4-Instruct-Data: hf:lmms-lab/M4-Instruct-Data

Locations that are not local folders are opened by :func:`framestream.tools.fetch.registry.open_source`. Annotation
files there, at web addresses, in buckets and on the hub are fetched (``tools/fetch/annotation_cache.py``), also without
a root map.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from framestream.pipeline.config.data import DataConfig, EntryConfig
from framestream.pipeline.config.manifest import BuildManifest, ManifestError
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.config.yaml_files import read_yaml
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.pipeline.utils.paths import PathError, expand_path
from framestream.tools.fetch.annotation_cache import AnnotationCache, cache_folder, remote_file
from framestream.tools.fetch.base import FetchError, MediaSource
from framestream.tools.fetch.host_health import SourcePool
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.registry import Location, check_archives, open_files, open_source, redact

THREADS = 8  #: locations opened and annotation files fetched at once

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ResolvedLocation:
    """Where an annotation file or the media of an entry are, or why they are missing (one line with the fix)."""

    path: Path | None  #: on this machine; None for a remote location
    origin: str  #: what is read, or would be read
    missing: str = ""  #: why it is missing; empty if it is resolved
    name: str = ""  #: the key of the root map, or the root; part of the identity of media items
    spec: Location = ""  #: opens the location: a value of a root map; a hub repository has its commit
    limits: FetchLimits = FetchLimits()
    member_lists: Path | None = None  #: folder that caches the lists of what archives contain

    @property
    def resolved(self) -> bool:
        """Whether the location is known. Files in it may still be missing."""
        return not self.missing

    def open(self) -> MediaSource:
        """Open the files below a resolved location.

        Raises:
            FetchError: the location cannot be read, or is invalid.
        """
        try:
            return open_source(self.spec, self.limits, self.member_lists)
        except ValueError as error:
            raise FetchError("unresolved", self.name, str(error)) from None


class RootMap:
    """The root map of a manifest. Without one, only local folders are resolved.

    Args:
        limits: for fetching annotation files.
        probe_limits: for finding out whether locations can be read.
    """

    def __init__(self, data: DataConfig, limits: FetchLimits, probe_limits: FetchLimits) -> None:
        self._file = data.roots
        self._sources = SourcePool(probe_limits)
        self._cache = cache_folder(data.cache)
        self._annotations = AnnotationCache(self._cache, self._sources, limits)
        self._map: dict[str, str | dict[str, Any]] = {}
        if data.roots:
            if not Path(data.roots).is_file():
                raise ManifestError(f"data.roots: {data.roots}: no such file; name your root map, or remove the field")
            for name, location in read_yaml(data.roots).items():
                if not isinstance(location, (str, dict)):
                    field = f"data.roots: {data.roots}: {name}"
                    raise ManifestError(f"{field}: expected text such as dir:/path or a mapping, got {location!r}")
                try:
                    self._map[expand_path(name)] = expand_location(to_dict(location))
                except PathError as error:
                    raise ManifestError(f"data.roots: {data.roots}: {name}: {error}") from None
        self._locks = {name: threading.Lock() for name in self._map}
        self._resolved: dict[str, ResolvedLocation] = {}

    def annotation(self, entry: EntryConfig) -> ResolvedLocation:
        """Resolve the annotation file of an entry to a local file; fetch it if it is remote."""
        name, remote = entry.annotation, remote_file(entry.annotation)
        if not remote:
            if not Path(name).is_file():
                missing = f"{name}: no such annotation file; correct data.entries or fetch it"
                return ResolvedLocation(None, name, missing)
            return ResolvedLocation(Path(name), name)
        location, path = remote
        hub = location.partition("@")[0] if location.startswith("hf:") else ""
        key = next((key for key in (location, hub) if key in self._map), "")
        spec = self._map[key] if key else location
        if isinstance(spec, str) and spec.startswith(("dir:", "links:")):
            folder = self._resolve(key)
            file = folder.path and folder.path / path
            if file and not file.is_file():
                return ResolvedLocation(None, folder.origin, f"{file}: no such annotation file")
            return ResolvedLocation(file, folder.origin, folder.missing)
        try:
            return ResolvedLocation(self._annotations.fetch(spec, path), key or name)
        except ManifestError:
            raise
        except (FetchError, ValueError) as error:
            fix = f"fetch it and map {hub} to dir:FOLDER{self._in_file}" if hub else "fetch it and name the local file"
            return ResolvedLocation(None, name, f"the annotation file is not on this machine: {error}; {fix}")

    def media(self, entry: EntryConfig) -> ResolvedLocation:
        """Resolve the location that the entry's media paths are relative to; a local folder to its real path."""
        for name in (entry.name, entry.root):
            if name and name in self._map:
                return self._resolve(name)
        if not entry.root:
            return ResolvedLocation(None, "", "the entry has media but no root; set its root to their folder")
        if "://" in entry.root or entry.root.startswith("hf:"):
            example = "manifests/roots.example.yaml"
            fix = f"map the root to a location{self._in_file}, see {example}{self._similar(entry.root)}"
            return ResolvedLocation(None, entry.root, f"the root is not a folder on this machine; {fix}")
        if not Path(entry.root).is_dir():
            mapping = f", or map it{self._in_file}" if self._file else ""
            fix = f"correct the entry's root{mapping}{self._similar(entry.root)}"
            return ResolvedLocation(None, entry.root, f"{entry.root}: no such folder; {fix}")
        return _local_folder(Path(entry.root), entry.root, entry.root)

    def _resolve(self, name: str) -> ResolvedLocation:
        """Resolve the root map's value of ``name``, once for all entries that share it."""
        with self._locks[name]:
            if name not in self._resolved:
                self._resolved[name] = self._find(name)
            return self._resolved[name]

    def _find(self, name: str) -> ResolvedLocation:
        """Find out whether the location that ``name`` stands for can be read; archives are listed, not opened."""
        spec, limits = self._map[name], self._sources.limits
        if not isinstance(spec, str):  # archives are only checked here: opening them may take long
            return self._resolve_archives(name, spec)
        scheme, _, folder = spec.partition(":")
        if scheme in ("dir", "links"):
            if not Path(folder).is_dir():
                return ResolvedLocation(None, spec, f"{self._file}: {name}: {folder} is not a folder")
            return _local_folder(Path(folder), spec, name, scheme)
        try:
            origin = self._sources.source(spec).origin
        except ValueError as error:
            raise ManifestError(f"data.roots: {self._file}: {name}: {error}") from None
        except FetchError as error:
            return ResolvedLocation(None, spec, f"{self._file}: {name}: {error}", name)
        return ResolvedLocation(None, origin, "", name, origin if spec.startswith("hf:") else spec, limits)

    def _resolve_archives(self, name: str, spec: Mapping[str, Any]) -> ResolvedLocation:
        """Check that archives exist, and name the present commits of their hub repositories."""
        try:
            check_archives(spec)
            files = [spec["archives"]] if isinstance(spec["archives"], str) else spec["archives"]
            pinned = {**spec, "archives": [self._pin(file) for file in files]}
            open_files(pinned["archives"], self._sources.limits)
        except ValueError as error:
            raise ManifestError(f"data.roots: {self._file}: {name}: {error}") from None
        except FetchError as error:
            return ResolvedLocation(None, redact(spec), f"{self._file}: {name}: {error}", name)
        member_lists = self._cache / "archives"
        try:
            member_lists.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ManifestError(f"data.cache: {member_lists}: cannot be created ({error.strerror})") from None
        return ResolvedLocation(None, redact(pinned), "", name, pinned, self._sources.limits, member_lists)

    def _pin(self, file: str) -> str:
        """Return a hub file with the commit of its repository; other files unchanged."""
        if not file.startswith("hf:"):
            return file
        repository, _, path = file.removeprefix("hf:").partition(":")
        return self._sources.source(f"hf:{repository}:").origin + path

    @property
    def _in_file(self) -> str:
        """Name the root map, for messages."""
        return f" in {self._file or 'a YAML file named by data.roots'}"

    def _similar(self, name: str) -> str:
        """Name the key that differs from ``name`` only in case and in slashes at its ends, for messages."""
        similar = (key for key in self._map if key.strip("/").casefold() == name.strip("/").casefold())
        return next((f"; it has `{key}`" for key in similar), "")


def expand_location(location: Any) -> Any:
    """Expand ``~`` and variables in the local paths of a location, and of a list or mapping of archives.

    Raises:
        PathError: a variable is not set.
    """
    if isinstance(location, dict):
        return {name: expand_location(item) if name == "archives" else item for name, item in location.items()}
    if isinstance(location, list):
        return [expand_location(item) for item in location]
    scheme, colon, path = location.partition(":") if isinstance(location, str) else ("", "", "")
    return f"{scheme}:{expand_path(path)}" if colon and scheme in ("dir", "links") else location


def _local_folder(path: Path, origin: str, name: str, scheme: str = "dir") -> ResolvedLocation:
    real = os.path.realpath(path)
    return ResolvedLocation(Path(real), origin, "", name, f"{scheme}:{real}")


@dataclass(frozen=True, slots=True)
class ResolvedEntry:
    """An entry with its number, its unique name, and the locations of its annotation file and media."""

    number: int
    entry: EntryConfig
    annotation: ResolvedLocation
    media: ResolvedLocation


def resolve_entries(manifest: BuildManifest, quick: bool = False) -> list[ResolvedEntry]:
    """Resolve the entries of a manifest, in order. Repeated names get ``~2``, ``~3`` ... appended.

    Args:
        quick: give up locations that do not answer within seconds.

    Raises:
        ManifestError: the root map cannot be used.
    """
    limits = FetchLimits.from_manifest(manifest.data)
    roots = RootMap(manifest.data, limits, replace(limits, retries=1, stall=5.0) if quick else limits)
    entries = manifest.data.entries
    media = _map_in_threads(roots.media, entries, "locations")
    annotations = _map_in_threads(roots.annotation, entries, "annotation files")
    name_counts: Counter[str] = Counter()
    resolved = []
    for number, (entry, annotation, location) in enumerate(zip(entries, annotations, media, strict=True)):
        name_counts[entry.name] += 1
        if name_counts[entry.name] > 1:
            entry = replace(entry, name=f"{entry.name}~{name_counts[entry.name]}")
        resolved.append(ResolvedEntry(number, entry, annotation, location))
    return resolved


def _map_in_threads(
    function: Callable[[EntryConfig], T], entries: tuple[EntryConfig, ...], description: str
) -> list[T]:
    with DaemonThreadPool(THREADS) as threads:
        results = threads.map(function, entries)
        return list(tqdm(results, desc=description, total=len(entries), disable=None, leave=False))
