"""Say in one short line how settings differ: which fields, and which items of their lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = 3  #: fields that are described
NAMES = 3  #: items of a list that are named
SHOWN_NAME = 50  #: characters of the name of an item
SHOWN_VALUE = 120  #: characters of a value
_NAME_FIELDS = ("name", "entry", "root")  #: the first of these that an item of a list has is its name


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any], words: tuple[str, str]) -> str:
    """Describe up to three fields that differ, and count the others; empty if none does.

    Args:
        before: values by the name of their field.
        after: the same now.
        words: what both are called, such as ``("saved", "now")``.
    """
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    shown = [_describe(name, before.get(name), after.get(name), words) for name in names[:FIELDS]]
    more = [f"{len(names) - FIELDS} more"] if len(names) > FIELDS else []
    return ", ".join([*shown, *more])


def _describe(name: str, before: Any, after: Any, words: tuple[str, str]) -> str:
    """Describe the change of one field as ``NAME (saved: X, now: Y)``, or by the items of its list."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return f"{name} ({describe_changes(before, after, words)})"
    if _is_list(before) and _is_list(after) and (before or after):
        return f"{name} ({_describe_items(before, after, words)})"
    return f"{name} ({words[0]}: {_show(before)}, {words[1]}: {_show(after)})"


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)


def _describe_items(before: Sequence[Mapping], after: Sequence[Mapping], words: tuple[str, str]) -> str:
    old, new = _by_name(before), _by_name(after)
    both = [name for name in new if name in old]
    changed = [name for name in both if new[name] != old[name]]
    groups = (
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
    )
    parts = [f"{len(names):,} {word}: {_list_names(names)}" for word, names in groups if names]
    if changed:
        first = f"{changed[0]:.{SHOWN_NAME}}: {describe_changes(old[changed[0]], new[changed[0]], words)}"
        parts.append(f"{len(changed):,} changed, such as {first}")
    if not changed and both != [name for name in old if name in new]:
        parts.append("in another order")
    return "; ".join(parts)


def _by_name(items: Sequence[Mapping]) -> dict[str, Mapping]:
    """Return items by their name; a repeated name gets its number."""
    counts: Counter[str] = Counter()
    named = {}
    for number, item in enumerate(items):
        name = next((str(item[field]) for field in _NAME_FIELDS if item.get(field)), f"[{number}]")
        counts[name] += 1
        named[name if counts[name] == 1 else f"{name}~{counts[name]}"] = item
    return named


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name:.{SHOWN_NAME}}" for name in names[:NAMES])
    return f"{shown}, ..." if len(names) > NAMES else shown


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 3] + "..."
