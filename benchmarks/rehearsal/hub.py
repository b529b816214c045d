"""Everything that the published manifests read from elsewhere: repositories of data sets and weights, local folders.

Names come from the manifests and from ``manifests/roots.example.yaml``. Only the folders below ``/data`` of that root
map move. Archives have the published names, where ``*`` becomes two numbers.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.rehearsal.samples import PublishedFile, draw_file
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.manifest import load_manifest
from framestream.tools.fetch.annotation_cache import remote_file
from tests.helpers.corpora.layouts import parts, write
from tests.helpers.media.memory_files import pack
from tests.helpers.paths import ROOT

MANIFESTS = ROOT / "manifests"
STAGES = (1, 2, 3, 4)
EXAMPLE_ROOTS = MANIFESTS / "roots.example.yaml"
SPLIT = 3  #: parts of a joined zip
NUMBERS = ("00000-of-00002", "00001-of-00002")  #: in place of a * of an archive's name


def published_entries(stages: Iterable[int] = STAGES) -> dict[str, list[EntryConfig]]:
    """Return the entries of the published stages by annotation file, in their order."""
    entries: dict[str, list[EntryConfig]] = defaultdict(list)
    for stage in stages:
        for entry in load_manifest(MANIFESTS / f"stage{stage}.yaml").data.entries:
            entries[entry.annotation].append(entry)
    return entries


def count_selected(entry: EntryConfig, count: int) -> int:
    """Return how many of ``count`` samples the published samplings use: all, or the first P %, rounded up."""
    return count if entry.sampling == "all" else math.ceil(int(entry.sampling[len("first:") : -1]) * count / 100)


@dataclass
class DataWorld:
    """Data sets of the hub, and folders of this machine.

    Attributes:
        folder: the current folder of the commands; media that are on no hub are below its ``data``.
        repositories: files of each data set by their paths.
        counts: samples of each annotation file.
    """

    folder: Path
    repositories: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    counts: dict[str, int] = field(default_factory=dict)
    _members: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    _joined: set[str] = field(default_factory=set)

    def add(self, entries: list[EntryConfig], number: int, count: int) -> PublishedFile:
        """Draw an annotation file with ``count`` samples, and put it and its media where each of ``entries`` looks."""
        first, roots = entries[0], read_roots(self.folder)
        file = draw_file(first, number, count)
        remote = remote_file(first.annotation)
        assert remote is not None
        self.counts[first.annotation] = count
        self.repositories[remote[0].removeprefix("hf:")][remote[1]] = file.encode(remote[1])
        locations = [roots.get(entry.name, roots.get(entry.root)) for entry in entries if file.media]
        for location in {str(location): location for location in locations}.values():
            assert location, f"{first.name}: the root map has neither its name nor its root {first.root}"
            self._place(location, file.media, number)
        return file

    def _place(self, location: str | Mapping[str, Any], media: Mapping[str, bytes], number: int) -> None:
        """Put media where a location of the root map says; archives are packed by :meth:`finish`."""
        if isinstance(location, str):
            scheme, _, place = location.partition(":")
            if scheme == "dir":
                write(Path(place), media)
            else:
                name, _, folder = place.partition(":")
                self.repositories[name] |= {f"{folder}/{path}": data for path, data in media.items()}
            return
        patterns = location["archives"]
        if location.get("join"):
            self._joined.add(patterns[0])
        folders = sorted({path.rpartition("/")[0] for path in media})
        for path, data in media.items():  # a folder of frames stays together
            turn = number + folders.index(path.rpartition("/")[0])
            self._members[patterns[turn % len(patterns)]][path] = data

    def finish(self) -> None:
        """Pack the archives; also those without a file, which a root map names and which must exist."""
        for location in read_roots(self.folder).values():
            for pattern in location["archives"] if isinstance(location, dict) else ():
                self._members[pattern].setdefault("README.txt", b"A rehearsal.")
            if isinstance(location, str) and location.startswith("dir:"):
                Path(location.removeprefix("dir:")).mkdir(parents=True, exist_ok=True)
        for pattern, members in self._members.items():
            name, _, path = pattern.removeprefix("hf:").partition(":")
            self.repositories[name] |= self._pack(pattern, path, members)
        for location in read_roots(self.folder).values():  # folders of the hub that no entry filled
            if isinstance(location, str) and location.startswith("hf:"):
                name, _, folder = location.removeprefix("hf:").partition(":")
                self.repositories[name].setdefault(f"{folder}/README.txt", b"A rehearsal.")

    def _pack(self, pattern: str, path: str, members: dict[str, bytes]) -> dict[str, bytes]:
        """Return the archives of a pattern by their paths."""
        if pattern in self._joined or path.endswith("/*"):
            stem = path.split("/")[-2].removesuffix("_zip")
            return parts(pack(members, "stored"), path.replace("*", stem + "_part_{:02d}.zip"), SPLIT)
        if "*" not in path:
            return {path: _archive(path, members)}
        names = sorted(members)
        halves = [{name: members[name] for name in part} for part in (names[::2], names[1::2])]
        if any(name.endswith((".jpeg", ".png.jpg")) or "/frame_" in name for name in names):  # folders of frames
            halves = [members, {"README.txt": b"A rehearsal."}]
        return {path.replace("*", number): _archive(path, half) for number, half in zip(NUMBERS, halves, strict=True)}


def _archive(path: str, members: Mapping[str, bytes]) -> bytes:
    if path.endswith(".parquet"):
        return _parquet({name: data for name, data in members.items() if not name.endswith(".txt")})
    return pack(members, "tar.gz" if path.endswith(".tar.gz") else "stored")


def _parquet(images: Mapping[str, bytes]) -> bytes:
    """Return a parquet file in the layout of lmms-lab's data sets: an id, an image with its path, and turns."""
    rows = [
        {
            "id": name.rpartition(".")[0] if number % 2 else str(number),
            "image": {"bytes": data, "path": None if number % 2 else name.rpartition("/")[2]},
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}],
            "data_source": "rehearsal",
        }
        for number, (name, data) in enumerate(images.items())
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("image", image), ("conversations", turns), ("data_source", pa.string())])
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), stream)
    return stream.getvalue()


def read_roots(folder: Path) -> dict[str, Any]:
    """Return the published root map; its folders ``/data`` are below ``folder``."""
    text = EXAMPLE_ROOTS.read_text(encoding="utf-8").replace("dir:/data/", f"dir:{folder}/data/")
    return yaml.safe_load(text)


def write_roots(folder: Path) -> None:
    """Write the root map as ``roots.yaml``, with all its comments, as a user who fills it in would."""
    text = EXAMPLE_ROOTS.read_text(encoding="utf-8").replace("dir:/data/", f"dir:{folder}/data/")
    (folder / "roots.yaml").write_text(text, encoding="utf-8")
