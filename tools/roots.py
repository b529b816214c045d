"""Where annotation files and media really are: local folders, and the user's root map.

The published recipe names web pages as roots. A root map (``data.roots``, a YAML file) says where their contents lie
on this machine; its keys are an entry's name, an entry's root or, for annotation files, ``hf:OWNER/NAME``::

    https://github.com/m-bain/webvid: dir:/data/webvid
    hf:OpenGVLab/VideoChat-Flash-Training-Data: dir:/data/videochat-flash
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.manifest import Data, Entry, Manifest, ManifestError
from pipeline.schema import read_yaml
from tools.fetch.source import FetchError, Source


class BuildError(ValueError):
    """Input that cannot be built, or another build in its place: one line that says why, with the fix."""


class WorkError(RuntimeError):
    """A build that stopped on its way, whatever the input: one line that says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Something that an entry needs: where it is on this machine, or why it is not (one line with the fix)."""

    path: Path | None
    origin: str  #: what it is read from, or would come from
    missing: str = ""
    name: str = ""  #: what the manifest and the root map call it; part of a media item's identity

    def open(self) -> Source:
        """The source of the files below it; for places that are known."""
        return Folder(self.path)


class Folder:
    """Files of a folder of this machine, without links out of it."""

    def __init__(self, root: Path) -> None:
        self._root, self.origin = root, f"dir:{root}"

    def find(self, path: str, tree: bool = False) -> int | None:
        return os.path.getsize(self._root / path) if os.path.exists(self._root / path) else None

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        named = self._root / path
        real = os.path.realpath(named)
        if os.path.commonpath((real, self._root)) != str(self._root):
            raise FetchError("outside_root", named, f"a link leads out of its root to {real}")
        return named


class Roots:
    """The root map of a manifest; a manifest without one has only local folders."""

    def __init__(self, data: Data) -> None:
        self._file = data.roots
        self._map: dict[str, str] = {}
        if data.roots:
            if not Path(data.roots).is_file():
                raise ManifestError(f"data.roots: {data.roots}: no such file; name your root map, or none")
            for name, place in read_yaml(data.roots).items():
                if not isinstance(place, str):
                    where = f"data.roots: {data.roots}: {name}"
                    raise ManifestError(f"{where}: expected text such as dir:/path, got {place!r}")
                self._map[str(name)] = place

    def annotation(self, entry: Entry) -> Place:
        """The entry's annotation file."""
        name, hub = entry.annotation, ""
        if name.startswith("hf:"):
            repository, _, inner = name[len("hf:") :].partition(":")
            hub = f"hf:{repository}"
        if hub in self._map:
            folder = self._folder(hub)
            path = folder.path and folder.path / inner
            if path and not path.is_file():
                return Place(None, folder.origin, f"{path}: no such annotation file")
            return Place(path, folder.origin, folder.missing)
        if hub or "://" in name:
            fix = f"fetch it and map {hub} to dir:FOLDER" if hub else "fetch it and name the local file"
            return Place(None, name, f"the annotation file is not on this machine; {fix}{self._where(hub)}")
        if not Path(name).is_file():
            return Place(None, name, f"{name}: no such annotation file; correct data.entries or fetch it")
        return Place(Path(name), name)

    def media(self, entry: Entry) -> Place:
        """The folder that the entry's media paths are relative to, without links."""
        for name in (entry.name, entry.root):
            if name and name in self._map:
                return self._folder(name)
        if not entry.root:
            return Place(None, "", "the entry has media but no root; set its root to their folder")
        if "://" in entry.root or entry.root.startswith("hf:"):
            fix = f"fetch the media and map the root to dir:FOLDER{self._where(entry.root)}"
            return Place(None, entry.root, f"the root is not a folder on this machine; {fix}")
        if not Path(entry.root).is_dir():
            return Place(None, entry.root, f"{entry.root}: no such folder; correct the entry's root")
        return Place(Path(os.path.realpath(entry.root)), entry.root, name=entry.root)

    def _folder(self, name: str) -> Place:
        place = self._map[name]
        if not place.startswith("dir:"):
            return Place(None, place, f"{self._file}: {name}: {place} cannot be read; give dir:FOLDER")
        folder = Path(place[len("dir:") :])
        if not folder.is_dir():
            return Place(None, place, f"{self._file}: {name}: {folder} is not a folder")
        return Place(Path(os.path.realpath(folder)), place, name=name)

    def _where(self, name: str) -> str:
        file = self._file or "a YAML file named by data.roots"
        return f" in {file}" if name else ""


@dataclass(frozen=True, slots=True)
class Origin:
    """An entry with its number, its unique name, and the places of its annotation file and media."""

    number: int
    entry: Entry
    annotation: Place
    media: Place


def origins(manifest: Manifest) -> list[Origin]:
    """The manifest's entries in order; a name that an earlier entry has gets ``~2``, ``~3`` ... appended."""
    roots, seen, found = Roots(manifest.data), Counter(), []
    for number, entry in enumerate(manifest.data.entries):
        seen[entry.name] += 1
        media = roots.media(entry)
        annotation = roots.annotation(entry)
        if seen[entry.name] > 1:
            entry = replace(entry, name=f"{entry.name}~{seen[entry.name]}")
        found.append(Origin(number, entry, annotation, media))
    return found
