"""Build frozen dataclasses from plain YAML data, with errors that name the file, the field and the fix.

A dataclass is its own schema. Annotations give the types, defaults give the defaults, and :func:`spec` adds permitted
values, bounds, whether it is a path, and a description. Supported annotations are ``bool``, ``int``, ``float``,
``str``, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and other dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from framestream.pipeline.utils.command_line import near_name
from framestream.pipeline.utils.paths import PathError, expand_path, is_address


class ManifestError(ValueError):
    """Bad input in a manifest: one line that names the file, the field and the fix."""


class MissingFieldsError(ManifestError):
    """Required fields of one section are missing."""

    def __init__(self, where: str, names: Sequence[str]) -> None:
        fix = ", ".join(f"`{name}: ...`" for name in names)
        super().__init__(f"{_join(where, names[0])}: required field is missing; add {fix}")
        self.where, self.names = where, tuple(names)


class _Dataclass(Protocol):
    """Any dataclass, for type checkers."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


Config = TypeVar("Config", bound=_Dataclass)

MAX_SHOWN = 60  #: characters of a value or a name in a message
MAX_FIELDS = 10  #: fields of a section that a message lists
_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (quote it if need be)"}


def spec(
    *,
    choices: Sequence[Any] = (),
    low: float | None = None,
    high: float | None = None,
    path: Literal["", "local", "any"] = "",
    flags: tuple[str, ...] = (),
    former: str = "",
    doc: str = "",
) -> dict[str, Any]:
    """Describe a field, as the ``metadata`` of :func:`dataclasses.field`.

    Args:
        choices: the permitted values; all values of the type if empty.
        low: the inclusive lower bound; every number has one.
        high: the inclusive upper bound; every number has one.
        path: whether the field is a path on this machine (``local``), or a path, address or name (``any``). Its ``~``
            and its variables are expanded.
        flags: of a text, the two values that ``false`` and ``true`` stand for.
        former: a field of earlier versions that this one replaces with other values.
        doc: what the field means.
    """
    return {"choices": choices, "low": low, "high": high, "path": path, "flags": flags, "former": former, "doc": doc}


def from_dict(cls: type[Config], value: Any, where: str) -> Config:
    """Build dataclass ``cls`` from the plain mapping ``value``.

    Args:
        where: file and path of the section, which begin every error: ``FILE: `` or ``FILE: SECTION.SECTION``.

    Raises:
        ManifestError: a field is unknown, missing, of another type or outside its permitted values.
    """
    if not isinstance(value, dict):
        fields_of = f"a mapping with the fields of {_section_name(cls)}"
        raise ManifestError(f"{where}: expected {fields_of}, got {show_value(value)}")
    hints = _type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, item in value.items():
        if name not in fields:
            shown = str(name) if str(name).isprintable() else ascii(name)
            if replaced := _former_fields(cls).get(name):
                doc = replaced.metadata.get("doc")
                raise ManifestError(f"{_join(where, shown)}: replaced by {replaced.name} ({doc}); set that instead")
            hint = suggest_name(shown, fields)
            if not hint and not where and isinstance(item, (dict, list)):
                hint = "; begin the name with `x-` if it only holds anchors"
            hint = hint or _list_fields(list(fields))
            raise ManifestError(f"{_join(where, shown[:MAX_SHOWN])}: unknown field{hint}")
        flags = fields[name].metadata.get("flags")
        item = flags[item] if flags and isinstance(item, bool) else item
        converted = _convert(hints[name], item, _join(where, name))
        arguments[name] = _check_value(fields[name], converted, _join(where, name))
    if missing := [name for name, field in fields.items() if _is_required(field) and name not in arguments]:
        raise MissingFieldsError(where, missing)
    try:
        return cls(**arguments)
    except ManifestError as error:
        raise ManifestError(_join(where, str(error))) from None


def drop_former_fields(cls: type, value: Any) -> Any:
    """Remove the fields of earlier versions from the mapping ``value`` of a stored file, in place; return it.

    Only for files that a run has written. They do not change what a model computes.
    """
    if isinstance(value, dict):
        for name in _former_fields(cls):
            value.pop(name, None)
        for name, hint in _type_hints(cls).items():
            if name in value and isinstance(hint, type) and dataclasses.is_dataclass(hint):
                drop_former_fields(hint, value[name])
    return value


def to_dict(value: Any) -> Any:
    """Convert dataclasses to mappings and tuples to lists, ready for YAML or JSON; the inverse of :func:`from_dict`."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def show_value(value: Any) -> str:
    """Show ``value``, shortened to 60 characters, with the name of its type."""
    text = repr(value)
    kind = "dict" if isinstance(value, dict) else type(value).__name__
    return f"{text if len(text) < MAX_SHOWN else text[: MAX_SHOWN - 3] + '...'} ({kind})"


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _former_fields(cls: type) -> dict[str, dataclasses.Field]:
    """Return the fields that replace those of earlier versions, by the earlier name."""
    return {field.metadata["former"]: field for field in dataclasses.fields(cls) if field.metadata.get("former")}


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _section_name(cls: type) -> str:
    """``FramesConfig`` as ``Frames``, ``CostModel`` as ``Cost``."""
    return re.sub("(?<=.)(Config|Model)$", "", cls.__name__)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert the plain ``value`` to the type ``hint``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (only,) = [option for option in inner if option is not type(None)]
        return None if value is None else _convert(only, value, where)
    if origin is tuple:
        return _convert_list(inner[0], value, where)
    if origin is dict:
        return _convert_mapping(inner[1], value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    return _convert_scalar(hint, value, where)


def _convert_list(hint: Any, value: Any, where: str) -> tuple:
    if not isinstance(value, list):
        fix = ""
        if type(value) is hint and re.fullmatch(r"[\w./][\w.,/ -]{0,59}", str(value)):
            fix = f"; write [{value}]"
        raise ManifestError(f"{where}: expected a list, got {show_value(value)}{fix}")
    return tuple(_convert(hint, item, f"{where}[{i}]") for i, item in enumerate(value))


def _convert_mapping(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: expected a mapping, got {show_value(value)}")
    return {str(key): _convert(hint, item, f"{where}.{key}") for key, item in value.items()}


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    converted = _to_float(value) if hint is float else value
    if type(converted) is not hint:  # bool is a subclass of int, and is not accepted for it
        raise ManifestError(f"{where}: expected {_SCALARS[hint]}, got {show_value(value)}{_rewrite(hint, value)}")
    return converted


def _to_float(value: Any) -> float | None:
    """Return the finite number that ``value`` stands for, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _rewrite(hint: type, value: Any) -> str:
    """Return how to write a value of another type, as the end of a message; empty if it is not known."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return ""
    text = str(value).strip().lower()
    if hint is bool:
        meant = "true" if text in ("yes", "on", "y", "1") else "false" if text in ("no", "off", "n", "0") else ""
        return f"; write {meant}" if meant else ""
    if hint is str or not re.fullmatch(r"[-+]?[\d_]*[.,]?[\d_]*(e[-+]?\d{1,3})?%?", text, re.ASCII):
        return ""
    try:
        number = float(text.rstrip("%").replace("_", "").replace(",", ".")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return ""
    if not math.isfinite(number) or (hint is int and (not number.is_integer() or abs(number) > 2**53)):
        return ""
    return f"; write {int(number) if hint is int else f'{number:g}'}"


def _check_value(field: dataclasses.Field, value: Any, where: str) -> Any:
    """Check the value of a field, and return it, a path expanded."""
    if value is None:
        return None
    choices, low, high, doc = (field.metadata.get(name) for name in ("choices", "low", "high", "doc"))
    if choices and value not in choices:
        hint = suggest_name(str(value), choices)
        raise ManifestError(f"{where}: {show_value(value)} is not one of {', '.join(map(str, choices))}{hint}")
    meaning = f" ({doc})" if doc else ""
    if low is not None and value < low:
        raise ManifestError(f"{where}: must be at least {show_bound(low)}, got {value!r:.30}{meaning}")
    if high is not None and value > high:
        raise ManifestError(f"{where}: must be at most {show_bound(high)}, got {value!r:.30}{meaning}")
    return _check_path(field, value, where) if field.metadata.get("path") else value


def show_bound(bound: float) -> str:
    """Return a bound of a number as text: ``1,000`` or ``1e-05``."""
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _check_path(field: dataclasses.Field, value: str, where: str) -> str:
    """Return the path of a field with its variables expanded; a default stays as it is, and is expanded where used."""
    if value == field.default:
        return value
    if not value and field.default != "":
        raise ManifestError(f"{where}: is empty; give a path")
    if field.metadata["path"] == "local" and is_address(value):
        raise ManifestError(f"{where}: {value:.200} is an address; give a path on this machine")
    try:
        return expand_path(value)
    except PathError as error:
        raise ManifestError(f"{where}: {error}") from None


def suggest_name(name: str, known: Iterable[Any]) -> str:
    """Return ``; did you mean `NAME`?`` with the nearest of ``known``, empty if none is near."""
    near = near_name(name, map(str, known), least=0.6)
    return f"; did you mean `{near}`?" if near else ""


def _list_fields(names: Sequence[str]) -> str:
    """List the first fields of a section, as the end of a message."""
    more = f" and {len(names) - MAX_FIELDS} more" if len(names) > MAX_FIELDS else ""
    return f"; the fields are {', '.join(names[:MAX_FIELDS])}{more}"


def _join(where: str, name: str) -> str:
    return f"{where}{name}" if not where or where.endswith(": ") else f"{where}.{name}"
