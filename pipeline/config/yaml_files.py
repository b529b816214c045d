"""Read YAML files that extend each other, and apply overrides from a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import framestream
from framestream.pipeline.config.catalog import expand_catalogs
from framestream.pipeline.config.schema import ManifestError, show_value
from framestream.pipeline.utils.paths import PathError, expand_path, is_address
from framestream.pipeline.utils.yaml_parser import MAX_BYTES, LocatedDict, YamlFormatError, parse_yaml

MAX_FILES = 64  #: files that one manifest extends, each as often as it is read
MAX_PARTS = 16  #: names in the field of a ``--set``
MAX_SHOWN = 80  #: characters of a ``--set`` in a message


def locate_manifest(name: str | Path) -> Path:
    """Return the file called ``name``, or else the manifest of that name that comes with framestream.

    A name that is neither is returned as it is, so that reading it says what is missing.
    """
    path = Path(_expand(str(name), "--manifest"))
    return path if path.is_file() else shipped_manifest(name) or path


def _expand(name: str, where: str) -> str:
    if is_address(name):
        raise ManifestError(f"{where}: {name:.200} is an address; give a file on this machine")
    try:
        return expand_path(name)
    except PathError as error:
        raise ManifestError(f"{where}: {error}") from None


def shipped_manifest(name: str | Path) -> Path | None:
    """Return the manifest of that name that comes with framestream, if any.

    ``stage3``, ``stage3.yaml`` and ``manifests/stage3.yaml`` are one name.
    """
    path = Path(name)
    parts = path.parts[1:] if path.parts[:1] == ("manifests",) else path.parts
    if path.is_absolute() or ".." in parts:
        return None
    shipped = Path(framestream.__file__).parent / "manifests" / Path(*parts)
    candidates = (shipped, shipped.with_name(f"{shipped.name}.yaml"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def load_yaml(path: str | Path) -> Any:
    """Parse one YAML file, with the places of its fields.

    Raises:
        ManifestError: it cannot be read, or is not valid YAML.
    """
    try:
        with open(path, "rb") as file:
            return parse_yaml(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); give the path of a manifest") from None
    except YamlFormatError as error:
        raise ManifestError(f"{path}:{error.line}: not valid YAML: {error}") from None


def read_yaml(path: str | Path) -> LocatedDict:
    """Read a YAML mapping, its catalogs replaced by entries, merged into the files that ``extends`` names, if any.

    ``extends: OTHER`` or ``extends: [FIRST, SECOND]`` is relative to the file. Each file is laid over those before it,
    and the file itself over all of them.

    Raises:
        ManifestError: a file cannot be read, is not a YAML mapping, or extends itself.
    """
    return _read(Path(path), (), [])


def _read(path: Path, above: tuple[Path, ...], read: list[Path]) -> LocatedDict:
    """Read a file that those ``above`` extend, and add it to the files ``read``."""
    if path.resolve() in above:
        raise ManifestError(f"{path}: extends: the file extends itself; remove the loop")
    read.append(path)
    if len(read) > MAX_FILES:
        raise ManifestError(f"{read[0]}: extends: more than {MAX_FILES} files are read; join some of them")
    value = load_yaml(path)
    if value is None:
        raise ManifestError(f"{path}: is empty; expected a mapping of fields at the top level")
    if not isinstance(value, LocatedDict):
        raise ManifestError(f"{path}: expected a mapping of fields at the top level, got {show_value(value)}")
    named = value.pop("extends", None)
    value = expand_catalogs(value, path, load_yaml)
    if named is None:
        return value
    bases = named if isinstance(named, list) else [named]
    if not bases or not all(isinstance(base, str) for base in bases):
        place = value.places["extends"]
        raise ManifestError(f"{place}: extends: expected a file name or a list of them, got {show_value(named)}")
    merged = LocatedDict()
    for base in bases:
        beside = path.parent / _expand(base, f"{value.places['extends']}: extends")
        extended = beside if beside.is_file() else shipped_manifest(base)
        if extended is None:
            place = value.places["extends"]
            raise ManifestError(
                f"{place}: extends: {beside}: no such file; name one beside this file, or a shipped one"
            )
        merged = merge_mappings(merged, _read(extended, (*above, path.resolve()), read))
    return merge_mappings(merged, value)


def merge_mappings(base: dict, over: dict) -> LocatedDict:
    """Lay ``over`` over ``base``: merge mappings field by field and replace everything else."""
    merged = LocatedDict(base, getattr(over, "place", ""), getattr(over, "places", {}))
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge_mappings(merged[name], value) if both else value
    return merged


def apply_override(value: dict, assignment: str) -> LocatedDict:
    """Apply one ``a.b.c=YAML`` assignment from a command line to a mapping.

    Raises:
        ManifestError: it is no such assignment.
    """
    path, sign, text = assignment.partition("=")
    names, place = path.split("."), override_name(assignment)
    if not sign or not all(names) or len(names) > MAX_PARTS:
        raise ManifestError(f"{place}: expected FIELD.FIELD=VALUE")
    try:
        item = parse_yaml(text, place, lines=False)
    except YamlFormatError as error:
        raise ManifestError(f"{place}: expected FIELD.FIELD=VALUE with a value in YAML ({error})") from None
    for name in reversed(names):
        item = LocatedDict({name: item}, places={name: place})
    return merge_mappings(value, item)


def override_name(assignment: str) -> str:
    """Return ``--set FIELD=VALUE``, shortened, as the place of a fault."""
    shown = assignment if assignment.isprintable() else ascii(assignment)
    return f"--set {shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + '...'}"
