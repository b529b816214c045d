"""Judge how reading a damaged file ended."""

from __future__ import annotations

import signal
from pathlib import PurePosixPath

from benchmarks.fuzz.sandbox import MAX_BYTES, SECONDS, Ended
from benchmarks.fuzz.target import Reading, Target

RIGHT = ("clean", "row", "same", "accepted")
WRONG = ("wrong", "nameless", "traceback", "crash", "hang", "memory")
OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "not enough memory", "Cannot allocate memory", "DefaultCPUAllocator")


def judge(target: Target, file: str, sound: Reading, ended: Ended) -> tuple[str, str]:
    """Return the class of an outcome, one of ``RIGHT`` or ``WRONG``, and a line about it.

    Args:
        target: that was read.
        file: that was damaged, relative to the folder of the target.
        sound: what reading gave before.
        ended: how reading ended.
    """
    if ended.hung:
        return "hang", f"runs longer than {SECONDS:g} s"
    if ended.signal:
        return "crash", signal.Signals(ended.signal).name
    if ended.peak > MAX_BYTES or any(text in ended.error for text in OUT_OF_MEMORY):
        return "memory", f"{ended.peak / 2**30:.1f} GiB; {ended.error[:300]}"
    if "Traceback (most recent call last)" in ended.output or (ended.reading is None and not ended.expected):
        return "traceback", (ended.trace or ended.output)[-1500:]
    if ended.reading is None:
        return ("clean" if _names(ended.error, file) else "nameless"), ended.error
    return _compare(target, file, sound, ended.reading, ended.output)


def _compare(target: Target, file: str, sound: Reading, found: Reading, output: str) -> tuple[str, str]:
    texts = "\n".join([*found.messages, *found.left_out.values(), output])
    changed = [name for name, content in found.items.items() if sound.items.get(name, content) != content]
    new = sorted(found.items.keys() - sound.items.keys())
    gone = sorted(sound.items.keys() - found.items.keys())
    unsaid = [name for name in gone if name not in found.left_out and not _names(texts, file)]
    if not (changed or new or gone) and found.left_out == sound.left_out:
        return "same", ""
    if changed or new or unsaid:
        kinds = (("changed", changed), ("new", new), ("missing without a word", unsaid))
        line = ", ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in kinds if names)
        own = not target.own_items or all(_is_about(name, file) for name in (*changed, *new, *unsaid))
        return ("accepted" if target.is_truth and own else "wrong"), line
    return "row", "; ".join([*found.left_out.values(), *found.messages])[:300]


def _names(text: str, file: str) -> bool:
    """Return whether a message names a file, or a folder that it is in."""
    path = PurePosixPath(file)
    return any(name in text for name in (path.name, *(str(parent) for parent in path.parents if parent.name)))


def _is_about(item: str, file: str) -> bool:
    """Return whether the name of an item has the name of a file, or of a folder that it is in, except the first."""
    return any(part in item for part in PurePosixPath(file).parts[1:])
