"""What decides the bytes of a build's shards, and how two builds differ in it."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from framestream.pipeline.config.manifest import Manifest, to_dict
from framestream.pipeline.utils.atomic_io import file_sha256
from framestream.tools.fetch.root_map import ResolvedEntry

FORMAT = 2  #: of the shards; raised whenever a change of the code changes their bytes
LIBRARIES = ("av", "numpy", "pillow", "pyarrow", "simplejpeg", "torch")  #: whose versions decide the bytes
LEFT_OUT = "left out"  #: stands for what an entry names and is not on this machine


def specification(manifest: Manifest, found: Sequence[ResolvedEntry], limit: int | None) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, as JSON; two builds with the same one give the same shards.

    Annotation files count by content and roots by how they lie to one another, so that moving data changes nothing.
    """
    frames, images = to_dict(manifest.frames), to_dict(manifest.images)
    entries = [
        {
            "name": origin.entry.name,
            "annotation": file_sha256(origin.annotation.path).hex() if origin.annotation.path else LEFT_OUT,
            "media": "found" if origin.media.resolved else LEFT_OUT,
            **{name: getattr(origin.entry, name) for name in ("root", "sampling", "reader", "media_type", "split")},
        }
        for origin in found
    ]
    compat = {} if manifest.compat == "none" else {"compat": manifest.compat}
    return {
        "format": FORMAT,
        **compat,
        "stage": manifest.stage,
        "seed": manifest.seed,
        "limit": limit or 0,
        "frames": {name: value for name, value in frames.items() if name != "time_message"},
        "images": {name: images[name] for name in ("quality", "max_side")},
        "data": {name: getattr(manifest.data, name) for name in ("text_placeholder", "shard_mb")},
        "entries": entries,
        "nested_roots": _nested(found),
        "libraries": {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES},
        "machine": platform.machine(),
    }


def without_additions(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """``here`` less what it adds to the finished build ``there``: new entries, and entries that were left out."""
    named = {entry["name"]: entry for entry in here["entries"]}
    entries = []
    for old in there["entries"]:
        if new := named.get(old["name"]):
            entries.append({**new, **{name: LEFT_OUT for name in ("annotation", "media") if old[name] == LEFT_OUT}})
    roots = [pair for pair in here["nested_roots"] if pair in there["nested_roots"]]
    return {**here, "entries": entries, "nested_roots": roots}


def difference(there: Mapping[str, Any], here: Mapping[str, Any], found: Sequence[ResolvedEntry]) -> str:
    """How the specification of a build differs from the one wanted, of the entries ``found``; empty if it does not.

    Names the entry or annotation file that is another one now, or else the first field, as ``FIELD is X there and Y
    here``.
    """
    places = {origin.entry.name: origin for origin in found}
    named = {entry["name"]: entry for entry in here["entries"]}
    for old in there["entries"]:
        new = named.pop(old["name"], None)
        if new is None:
            return f"entry {old['name']} is there and not in the manifest"
        if other := _entry_difference(old, new, places[old["name"]]):
            return other
    if named:
        return f"entry {next(iter(named))} is in the manifest and not there"
    return _first_difference(there, here)


def _entry_difference(old: Mapping[str, Any], new: Mapping[str, Any], origin: ResolvedEntry) -> str:
    before, now, file = old["annotation"], new["annotation"], origin.annotation.path or origin.entry.annotation
    if before != now:
        if now == LEFT_OUT:
            return f"{file} was here for the build and is not now"
        return f"{file} was left out of the build" if before == LEFT_OUT else f"{file} has changed since the build"
    if old["media"] != new["media"] == LEFT_OUT:
        return f"the media of entry {old['name']} were found for the build and are not now ({origin.media.missing})"
    other = _first_difference(old, new)
    return other and f"entry {old['name']}: {other}"


def _first_difference(there: Any, here: Any, where: str = "") -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(f".{name}", there.get(name), here.get(name)) for name in _names(there, here)]
    elif isinstance(there, list) and isinstance(here, list):
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(itertools.zip_longest(there, here))]
    elif there == here:
        return ""
    else:
        shown = ["absent" if value is None else f"{_name(value)!r:.80}" for value in (there, here)]
        return f"{where} is {shown[0]} there and {shown[1]} here"
    return next((found for name, a, b in pairs if (found := _first_difference(a, b, f"{where}{name}".lstrip(".")))), "")


def _names(*mappings: dict[str, Any]) -> list[str]:
    """The fields of all; the name first, because an entry with another one differs in everything."""
    return sorted(dict.fromkeys(name for fields in mappings for name in fields), key=lambda name: name != "name")


def _name(value: Any) -> Any:
    return value.get("name", value) if isinstance(value, dict) else value


def _nested(found: Sequence[ResolvedEntry]) -> list[list[str]]:
    """Roots that are one place or lie within another, as [root, other root, path from one to the other]."""
    places = {origin.media.name: origin.media.path for origin in found if origin.media.path}
    pairs = []
    for outer, above in places.items():
        for inner, below in places.items():
            if outer != inner and below.is_relative_to(above):
                pairs.append([outer, inner, str(below.relative_to(above))])
    return sorted(pairs)
