"""The specification of a build: everything that decides the bytes of its shards, and how two of them differ."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from framestream.pipeline.config.data import DataConfig
from framestream.pipeline.config.manifest import BuildManifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.media.decoders.base import DecoderConfig
from framestream.pipeline.media.decoders.choice import decoder_versions
from framestream.pipeline.utils.atomic_io import file_sha256
from framestream.tools.fetch.root_map import ResolvedEntry

FORMAT = 2  #: of the shards; raised when a code change alters their bytes
LIBRARIES = ("av", "numpy", "pillow", "pyarrow", "simplejpeg", "torch")  #: libraries whose versions decide the bytes
DECODING = ("decoder", "hwaccel")  #: fields of ``data`` that stand in a specification only if they are not the default
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DataConfig)}
LEFT_OUT = "left out"  #: stands for a file or folder of an entry that could not be found


def specification(manifest: BuildManifest, resolved: Sequence[ResolvedEntry], limit: int | None) -> dict[str, Any]:
    """Return everything that decides the bytes of the shards, as JSON. Equal specifications give equal shards.

    Annotation files are identified by content, and roots by which of them contain each other. So moving data changes
    nothing. A decoder or device other than the default stands in it with its version.

    Raises:
        DecoderError: the decoder is not installed.
    """
    frames, images = to_dict(manifest.frames), to_dict(manifest.images)
    entries = [
        {
            "name": item.entry.name,
            "annotation": file_sha256(item.annotation.path).hex() if item.annotation.path else LEFT_OUT,
            "media": "found" if item.media.resolved else LEFT_OUT,
            **{name: getattr(item.entry, name) for name in ("root", "sampling", "reader", "media_type", "split")},
        }
        for item in resolved
    ]
    chosen = {name: getattr(manifest.data, name) for name in DECODING}
    chosen = {name: value for name, value in chosen.items() if value != _DEFAULTS[name]}
    libraries = {name: importlib.metadata.version(name).partition("+")[0] for name in LIBRARIES}
    compat = {} if manifest.compat == "none" else {"compat": manifest.compat}
    return {
        "format": FORMAT,
        **compat,
        "stage": manifest.stage,
        "seed": manifest.seed,
        "limit": limit or 0,
        "frames": {name: value for name, value in frames.items() if name != "time_message"},
        "images": {name: images[name] for name in ("quality", "max_side")},
        "data": {name: getattr(manifest.data, name) for name in ("text_placeholder", "shard_mb")} | chosen,
        "entries": entries,
        "nested_roots": _nested_roots(resolved),
        "libraries": libraries | decoder_versions(DecoderConfig.of(manifest.data)),
        "machine": platform.machine(),
    }


def without_additions(built: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``wanted`` without what it adds to the finished build ``built``.

    Additions are new entries, and entries that were left out of the build.
    """
    wanted_entries = {entry["name"]: entry for entry in wanted["entries"]}
    entries = []
    for old in built["entries"]:
        if new := wanted_entries.get(old["name"]):
            entries.append({**new, **{name: LEFT_OUT for name in ("annotation", "media") if old[name] == LEFT_OUT}})
    roots = [pair for pair in wanted["nested_roots"] if pair in built["nested_roots"]]
    return {**wanted, "entries": entries, "nested_roots": roots}


def difference(built: Mapping[str, Any], wanted: Mapping[str, Any], resolved: Sequence[ResolvedEntry]) -> str:
    """Describe how the specification ``built`` differs from ``wanted``; empty if it does not.

    The text names the entry or annotation file that differs, or else the first field, as ``FIELD was X and is now
    Y``. ``resolved`` are the entries of ``wanted``.
    """
    entries = {item.entry.name: item for item in resolved}
    wanted_entries = {entry["name"]: entry for entry in wanted["entries"]}
    for old in built["entries"]:
        new = wanted_entries.pop(old["name"], None)
        if new is None:
            return f"entry {old['name']} is missing from the manifest"
        if text := _entry_difference(old, new, entries[old["name"]]):
            return text
    if wanted_entries:
        return f"entry {next(iter(wanted_entries))} is new in the manifest"
    return _first_difference(built, wanted)


def _entry_difference(old: Mapping[str, Any], new: Mapping[str, Any], resolved: ResolvedEntry) -> str:
    before, now, file = old["annotation"], new["annotation"], resolved.annotation.path or resolved.entry.annotation
    if before != now:
        if now == LEFT_OUT:
            return f"{file} was available for the build and is missing now"
        return f"{file} was left out of the build" if before == LEFT_OUT else f"{file} has changed since the build"
    if old["media"] != new["media"] == LEFT_OUT:
        return (
            f"the media of entry {old['name']} were found for the build and are missing now ({resolved.media.missing})"
        )
    text = _first_difference(old, new)
    return text and f"entry {old['name']}: {text}"


def _first_difference(built: Any, wanted: Any, field: str = "") -> str:
    if isinstance(built, dict) and isinstance(wanted, dict):
        pairs = [(f".{name}", built.get(name), wanted.get(name)) for name in _fields(built, wanted)]
    elif isinstance(built, list) and isinstance(wanted, list):
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(itertools.zip_longest(built, wanted))]
    elif built == wanted:
        return ""
    else:
        section, _, name = field.rpartition(".")
        absent = repr(_DEFAULTS[name]) if section == "data" and name in DECODING else "absent"
        shown = [absent if value is None else f"{_name(value)!r:.80}" for value in (built, wanted)]
        return f"{field} was {shown[0]} and is now {shown[1]}"
    return next((text for name, a, b in pairs if (text := _first_difference(a, b, f"{field}{name}".lstrip(".")))), "")


def _fields(*mappings: dict[str, Any]) -> list[str]:
    """Return the fields of all mappings, ``name`` first: an entry of another name differs in everything."""
    return sorted(dict.fromkeys(name for fields in mappings for name in fields), key=lambda name: name != "name")


def _name(value: Any) -> Any:
    return value.get("name", value) if isinstance(value, dict) else value


def _nested_roots(resolved: Sequence[ResolvedEntry]) -> list[list[str]]:
    """List roots that are equal or within one another, as [root, other root, path from one to the other]."""
    folders = {item.media.name: item.media.path for item in resolved if item.media.path}
    pairs = []
    for outer, above in folders.items():
        for inner, below in folders.items():
            if outer != inner and below.is_relative_to(above):
                pairs.append([outer, inner, str(below.relative_to(above))])
    return sorted(pairs)
