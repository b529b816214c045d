"""From YAML to frozen dataclasses, with errors that name the file, the field and the fix.

A dataclass is its own schema: annotations are the types, defaults are the defaults, and a field named in a
``choices`` metadata may only take those values. Supported annotations: ``bool int float str``, ``X | None``,
``tuple[X, ...]``, ``dict[str, X]`` and other dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml


class ManifestError(ValueError):
    """Bad input in a manifest: one line that names the file, the field and the fix."""


def config_field(
    default: Any = dataclasses.MISSING, *, choices: tuple = (), low: float | None = None, doc: str = ""
) -> Any:
    """A dataclass field with a permitted set (``choices``), an inclusive lower bound (``low``) and a description."""
    metadata = {"choices": choices, "low": low, "doc": doc}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_dict(cls: type, value: Any, where: str) -> Any:
    """Build dataclass ``cls`` from the plain mapping ``value``; ``where`` (file: field path) leads every error."""
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: expected a mapping with the fields of {cls.__name__}, got {_show(value)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, item in value.items():
        if name not in fields:
            shown = str(name) if str(name).isprintable() else ascii(name)
            raise ManifestError(f"{_join(where, shown)}: unknown field{_nearest(shown, fields)}")
        built[name] = _convert(hints[name], item, _join(where, name))
        _check(fields[name], built[name], _join(where, name))
    for name, f in fields.items():
        if name not in built and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ManifestError(f"{_join(where, name)}: required field is missing; add `{name}: ...`")
    try:
        return cls(**built)
    except ManifestError as error:
        raise ManifestError(_join(where, str(error))) from None


def read_yaml(path: str | Path, seen: tuple[Path, ...] = ()) -> dict:
    """Read a YAML mapping, overlaid (``merge``) on the files that ``extends`` names, if any.

    ``extends: OTHER`` or ``extends: [FIRST, SECOND]``, relative to the file: each is overlaid on those before it.
    """
    path = Path(path)
    if path.resolve() in seen:
        raise ManifestError(f"{path}: extends: the file extends itself; remove the loop")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise ManifestError(f"{path}: cannot be read ({reason}); give the path of a manifest") from None
    try:
        value = _Yaml(text).get_single_data()
    except yaml.YAMLError as error:
        text = str(error).replace('in "<unicode string>", ', "at ")
        raise ManifestError(f"{path}: not valid YAML: {' '.join(text.split())}") from None
    if value is None:
        raise ManifestError(f"{path}: is empty; expected a mapping of fields at the top level")
    if not isinstance(value, dict):
        raise ManifestError(f"{path}: expected a mapping of fields at the top level, got {_show(value)}")
    named = value.pop("extends", None)
    if named is None:
        return value
    bases = named if isinstance(named, list) else [named]
    if not bases or not all(isinstance(base, str) for base in bases):
        raise ManifestError(f"{path}: extends: expected a file name or a list of them, got {_show(named)}")
    merged: dict = {}
    for base in bases:
        merged = merge_mappings(merged, read_yaml(path.parent / base, (*seen, path.resolve())))
    return merge_mappings(merged, value)


def merge_mappings(base: dict, over: dict) -> dict:
    """Overlay ``over`` on ``base``: mappings are merged field by field, everything else is replaced."""
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
        item = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ManifestError(f"--set {assignment}: expected FIELD.FIELD=VALUE with a value in YAML") from None
    for name in reversed(path.split(".")):
        item = {name: item}
    return merge_mappings(value, item)


def to_dict(value: Any) -> Any:
    """The inverse of :func:`build`: dataclasses become mappings and tuples lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which a field that stands twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for position, name in enumerate(names):
            if name in names[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{name}` stands twice; keep one", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ManifestError(f"{where}: expected a list, got {_show(value)}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: expected a mapping, got {_show(value)}")
        inner = typing.get_args(hint)[1]
        return {str(key): _convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if hint is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5, without a dot, as text
            try:
                number = float(value)
            except ValueError:
                number = math.nan
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(value)
        else:
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is hint:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text (quote it if need be)"}
    raise ManifestError(f"{where}: expected {names[hint]}, got {_show(value)}")


def _check(f: dataclasses.Field, value: Any, where: str) -> None:
    choices, low = f.metadata.get("choices"), f.metadata.get("low")
    if choices and value not in choices:
        hint = _nearest(str(value), choices)
        raise ManifestError(f"{where}: {_show(value)} is not one of {', '.join(map(str, choices))}{hint}")
    if low is not None and value is not None and value < low:
        raise ManifestError(f"{where}: must be at least {low}, got {value}")


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, [str(item) for item in known], n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def _join(where: str, name: str) -> str:
    return f"{where}{name}" if where.endswith(": ") else f"{where}.{name}"


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} ({type(value).__name__})"
