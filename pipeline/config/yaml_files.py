"""Read YAML files that extend each other, and apply overrides from a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import framestream
from framestream.pipeline.config.catalog import expand_catalogs
from framestream.pipeline.config.schema import ManifestError, show_value


def locate_manifest(name: str | Path) -> Path:
    """Return the file called ``name``, or else the manifest of that name that comes with framestream.

    A name that is neither is returned as it is, so that reading it says what is missing.
    """
    path = Path(name)
    return path if path.is_file() else shipped_manifest(name) or path


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
    """Parse one YAML file.

    Raises:
        ManifestError: it cannot be read, or is not valid YAML.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise ManifestError(f"{path}: cannot be read ({reason}); give the path of a manifest") from None
    try:
        return _UniqueKeyLoader(text).get_single_data()
    except yaml.YAMLError as error:
        reason = str(error).replace('in "<unicode string>", ', "at ")
        raise ManifestError(f"{path}: not valid YAML: {' '.join(reason.split())}") from None


def read_yaml(path: str | Path, seen: tuple[Path, ...] = ()) -> dict:
    """Read a YAML mapping, its catalogs replaced by entries, merged into the files that ``extends`` names, if any.

    ``extends: OTHER`` or ``extends: [FIRST, SECOND]`` is relative to the file. Each file is laid over those before it,
    and the file itself over all of them.

    Args:
        seen: files that led here, to find loops.

    Raises:
        ManifestError: a file cannot be read, is not a YAML mapping, or extends itself.
    """
    path = Path(path)
    if path.resolve() in seen:
        raise ManifestError(f"{path}: extends: the file extends itself; remove the loop")
    value = load_yaml(path)
    if value is None:
        raise ManifestError(f"{path}: is empty; expected a mapping of fields at the top level")
    if not isinstance(value, dict):
        raise ManifestError(f"{path}: expected a mapping of fields at the top level, got {show_value(value)}")
    named = value.pop("extends", None)
    value = expand_catalogs(value, path, load_yaml)
    if named is None:
        return value
    bases = named if isinstance(named, list) else [named]
    if not bases or not all(isinstance(base, str) for base in bases):
        raise ManifestError(f"{path}: extends: expected a file name or a list of them, got {show_value(named)}")
    merged: dict = {}
    for base in bases:
        beside = path.parent / base
        extended = beside if beside.is_file() else shipped_manifest(base) or beside
        merged = merge_mappings(merged, read_yaml(extended, (*seen, path.resolve())))
    return merge_mappings(merged, value)


def merge_mappings(base: dict, over: dict) -> dict:
    """Lay ``over`` over ``base``: merge mappings field by field and replace everything else."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge_mappings(merged[name], value) if both else value
    return merged


def apply_override(value: dict, assignment: str) -> dict:
    """Apply one ``a.b.c=YAML`` assignment from a command line to a plain mapping."""
    path, sign, text = assignment.partition("=")
    if not sign or not path:
        raise ManifestError(f"--set {assignment}: expected FIELD.FIELD=VALUE")
    try:
        item: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ManifestError(f"--set {assignment}: expected FIELD.FIELD=VALUE with a value in YAML") from None
    for name in reversed(path.split(".")):
        item = {name: item}
    return merge_mappings(value, item)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML in which a repeated field is an error. PyYAML itself would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{name}` is given twice; keep one", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)
