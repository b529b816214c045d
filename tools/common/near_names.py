"""Names that are near a missing one, for messages."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MOST = 3  #: names in a message

_MAX_SHOWN = 80  # characters of a name


def near_names(name: str, names: Iterable[str]) -> str:
    """Return `` `; near it: `A`, `B` `` with names that differ little from ``name``, or else the first of all.

    Two names differ little if the letters and digits of their last parts are the same, except for case, accents and
    extension.

    Args:
        name: the missing name.
        names: those that exist, in any order.
    """
    existing = sorted(set(names))
    if not existing:
        return ""
    wanted = _letters(name)
    near = [item for item in existing if wanted and _letters(item) == wanted]
    if near:
        return f"; near it: {_list(near)}"
    return f"; here is {_list(existing)}"


def _letters(name: str) -> str:
    stem = re.sub(r"(?<=.)\.\w{1,5}$", "", re.split(r"[/\\]", name)[-1])
    return "".join(letter for letter in unicodedata.normalize("NFKD", stem).casefold() if letter.isalnum())


def _list(names: list[str]) -> str:
    shown = ", ".join(f"`{_printable(name[:_MAX_SHOWN])}`" for name in names[:MOST])
    return shown if len(names) <= MOST else f"{shown} and {len(names) - MOST:,} more"


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
