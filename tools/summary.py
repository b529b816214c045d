"""Tables for the terminal: what a build made of each entry, and what a dry run found of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.plan import EntryCount
from tools.roots import Origin


def build_summary(record: Mapping[str, Any]) -> str:
    """The table of a finished build, from its build.json: one line by entry, and a total."""
    rows, total = [], dict.fromkeys(("planned", "dialogues", "media", "frames", "bytes"), 0)
    for entry in record["entries"]:
        for name in total:
            total[name] += entry[name]
        numbers = [f"{entry[name]:,}" for name in ("planned", "dialogues", "media", "frames")]
        rows.append([entry["name"], *numbers, _size(entry["bytes"]), _reasons(entry["left_out"])])
    numbers = [f"{total[name]:,}" for name in ("planned", "dialogues", "media", "frames")]
    shards = ", ".join(f"{count} {folder}" for folder, count in sorted(record["shards"].items())) or "no"
    rows.append(["total", *numbers, _size(total["bytes"]), f"{shards} shards"])
    return _aligned(["entry", "planned", "dialogues", "media", "frames", "bytes", "left out"], rows)


def plan_summary(found: Sequence[Origin], counts: Mapping[str, EntryCount]) -> str:
    """The table of a dry run: by entry what would be read, from where, and what is missing and why."""
    rows, missing = [], 0
    for origin in found:
        count = counts[origin.entry.name]
        problems = []
        if origin.annotation.path is None:
            problems.append(origin.annotation.missing)
        if origin.media.path is None and (origin.annotation.path is None or "unresolved" in count.left_out):
            problems.append(origin.media.missing)
        missing += bool(problems)
        here = origin.annotation.path is not None
        numbers = [str(number) if here else "unknown" for number in (count.samples, count.media, count.found)]
        problems += [f"{reason}: {number}" for reason, number in sorted(count.left_out.items()) if here]
        source = origin.media.origin or origin.annotation.origin
        rows.append([origin.entry.name, *numbers, source, "; ".join(problems)])
    table = _aligned(["entry", "dialogues", "media", "found", "from", "missing or left out"], rows)
    return f"{table}\n{len(rows)} entries, {len(rows) - missing} resolved, {missing} unresolved"


def _reasons(left_out: Mapping[str, Mapping[str, int]]) -> str:
    parts = []
    for kind, reasons in left_out.items():
        parts += [f"{kind} {reason} {count:,}" for reason, count in reasons.items()]
    return ", ".join(parts)


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numbers = {
        i for i, name in enumerate(head) if name in ("planned", "dialogues", "media", "found", "frames", "bytes")
    }
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
