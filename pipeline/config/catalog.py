"""Catalogs: annotation files that several manifests use, stated once.

A catalog is a YAML list of groups. The fields of a group hold for each of its annotations, and ``folder`` is put in
front of their names::

    - folder: hf:OWNER/NAME:annotations/video/
      media_type: video
      annotations:
        - first.json
        - annotation: second.json
          root: https://host/second
          samples: 1200

A manifest names catalogs and says how many samples it takes of their entries::

    data:
      catalogs: [data/videos.yaml]
      sampling: {default: all, "first:25%": [second]}

Reading the manifest replaces both fields by ``data.entries``: those of the catalogs, then the manifest's own.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from framestream.pipeline.config.data import EntryConfig, entry_name
from framestream.pipeline.config.schema import ManifestError, from_dict, show_value
from framestream.pipeline.utils.paths import PathError, expand_path, is_address
from framestream.pipeline.utils.yaml_parser import LocatedDict, find_place

MAX_CATALOGS = 64  #: of a manifest
DEFAULT = "default"  #: the sampling of entries that ``data.sampling`` does not name


def expand_catalogs(value: LocatedDict, path: Path, load: Callable[[Path], Any]) -> LocatedDict:
    """Replace ``data.catalogs`` and ``data.sampling`` of a manifest by ``data.entries``.

    Args:
        value: the mapping of the manifest at ``path``, before it is merged with what it extends.
        path: of the manifest; catalogs are relative to it.
        load: parses one YAML file.

    Raises:
        ManifestError: a catalog or a field is malformed, or ``sampling`` names an entry that no catalog has.
    """
    data = value.get("data")
    if not isinstance(data, dict) or not {"catalogs", "sampling"} & data.keys():
        return value
    data = LocatedDict(data)
    names, sampling = data.pop("catalogs", None), data.pop("sampling", {})
    own = data.get("entries", [])
    with _placed(value, path):
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ManifestError(f"data.catalogs: expected a list of file names, got {show_value(names)}")
        if not isinstance(own, list):
            raise ManifestError(f"data.entries: expected a list, got {show_value(own)}")
        if len(names) > MAX_CATALOGS:
            raise ManifestError(f"data.catalogs: names {len(names)} files; the most are {MAX_CATALOGS}")
        try:
            names = [expand_path(name) for name in names]
        except PathError as error:
            raise ManifestError(f"data.catalogs: {error}") from None
        if addresses := [name for name in names if is_address(name)]:
            raise ManifestError(f"data.catalogs: {addresses[0]:.200} is an address; give a file on this machine")
        if missing := [name for name in names if not (path.parent / name).is_file()]:
            raise ManifestError(f"data.catalogs: {path.parent / missing[0]}: no such file; correct the name")
    entries = [entry for name in names for entry in read_catalog(path.parent / name, load)]
    with _placed(value, path):
        _sample(entries, sampling, "data.sampling")
    data["entries"] = [*entries, *own]
    return LocatedDict({**value, "data": data}, value.place, value.places)


@contextlib.contextmanager
def _placed(value: Any, path: Path) -> Iterator[None]:
    """Put the place of a field of ``value`` in front of errors that begin with the field."""
    try:
        yield
    except ManifestError as error:
        raise ManifestError(f"{find_place(value, str(error)) or path}: {error}") from None


def read_catalog(path: Path, load: Callable[[Path], Any]) -> list[LocatedDict]:
    """Read the entries of a catalog, each a mapping with fields of ``data.entries[]``.

    Raises:
        ManifestError: one line naming the file, the field and the fix.
    """
    groups = load(path)
    if not isinstance(groups, list):
        raise ManifestError(f"{path}: expected a list of groups with `annotations`, got {show_value(groups)}")
    with _placed(groups, path):
        return [entry for number, group in enumerate(groups) for entry in _group_entries(group, f"[{number}]")]


def _group_entries(group: Any, where: str) -> list[LocatedDict]:
    """Return the entries of one group, which stands at ``where``."""
    if not isinstance(group, dict) or not isinstance(group.get("annotations"), list) or not group["annotations"]:
        raise ManifestError(f"{where}.annotations: expected a list of annotation files; add `annotations: [...]`")
    shared = {name: item for name, item in group.items() if name not in ("folder", "annotations")}
    folder = group.get("folder", "")
    if not isinstance(folder, str):
        raise ManifestError(f"{where}.folder: expected text, got {show_value(folder)}")
    entries: list[LocatedDict] = []
    for position, named in enumerate(group["annotations"]):
        own = LocatedDict({"annotation": named} if isinstance(named, str) else named if isinstance(named, dict) else {})
        field = f"{where}.annotations[{position}]"
        if not isinstance(own.get("annotation"), str):
            raise ManifestError(f"{field}: expected a file name or a mapping with `annotation`")
        fields = {**shared, **own, "annotation": folder + own["annotation"]}
        place, places = getattr(group, "place", ""), getattr(group, "places", {})
        entry = LocatedDict(fields, getattr(named, "place", place), {**places, **own.places})
        from_dict(EntryConfig, entry, field)
        entries.append(entry)
    return entries


def _sample(entries: list[LocatedDict], sampling: Any, where: str) -> None:
    """Write the sampling of a manifest into the entries of its catalogs."""
    if not isinstance(sampling, dict):
        raise ManifestError(f"{where}: expected a mapping from a sampling to entry names, got {show_value(sampling)}")
    by_name = {entry.get("name") or entry_name(entry["annotation"]): entry for entry in entries}
    places = getattr(sampling, "places", {})
    if DEFAULT in sampling:
        for entry in entries:
            entry["sampling"], entry.places["sampling"] = sampling[DEFAULT], places.get(DEFAULT, "")
    seen: set[str] = set()
    for taken, names in sampling.items():
        if taken == DEFAULT:
            continue
        if not isinstance(names, list):
            raise ManifestError(f"{where}.{taken}: expected a list of entry names, got {show_value(names)}")
        for name in names:
            if not isinstance(name, str) or name not in by_name:
                near = difflib.get_close_matches(str(name), by_name, n=1, cutoff=0.5)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise ManifestError(f"{where}.{taken}: no entry of the catalogs is named {name!r:.60}{hint}")
            if name in seen:
                raise ManifestError(f"{where}.{taken}: {name} is named twice; name it once")
            seen.add(name)
            by_name[name]["sampling"], by_name[name].places["sampling"] = taken, places.get(taken, "")
