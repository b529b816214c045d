"""Tables for the terminal: what a build made of each entry, and what a dry run found of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.ledger import REASONS
from tools.plan import EntryCount
from tools.roots import Origin


def build_summary(record: Mapping[str, Any]) -> str:
    """The table of a finished build, from its build.json: one line by entry, and a total."""
    rows, total = [], dict.fromkeys(("planned", "dialogues", "media", "frames", "bytes"), 0)
    left_out: dict[str, Counter[str]] = {}
    for entry in record["entries"]:
        for name in total:
            total[name] += entry[name]
        for kind, reasons in entry["left_out"].items():
            left_out.setdefault(kind, Counter()).update(reasons)
        numbers = [f"{entry[name]:,}" for name in ("planned", "dialogues", "media", "frames")]
        rows.append([entry["name"], *numbers, _size(entry["bytes"]), _reasons(entry["left_out"])])
    numbers = [f"{total[name]:,}" for name in ("planned", "dialogues", "media", "frames")]
    rows.append(["total", *numbers, _size(total["bytes"]), _reasons(left_out)])
    return _aligned(["entry", "planned", "dialogues", "media", "frames", "bytes", "left out"], rows)


def plan_summary(found: Sequence[Origin], counts: Mapping[str, EntryCount]) -> str:
    """The table of a dry run: by entry what would be read, and from where; then what is missing, by its cause."""
    rows, causes = [], {}
    unresolved = 0
    for origin in found:
        count, name = counts[origin.entry.name], _short(origin.entry.name, 50)
        problems = []
        if origin.annotation.path is None:
            problems.append(origin.annotation.missing)
        if origin.media.path is None and (origin.annotation.path is None or "unresolved" in count.left_out):
            problems.append(origin.media.missing)
        unresolved += bool(problems)
        here = origin.annotation.path is not None
        numbers = [f"{number:,}" if here else "?" for number in (count.samples, count.media, count.found)]
        source = _short(origin.media.origin or origin.annotation.origin, 56)
        rows.append([name, *numbers, "no" if problems else "yes", source])
        for problem in problems:
            causes.setdefault(problem, []).append(name)
        if count.missing:
            problem = f"{count.media - count.found:,} of {count.media:,} media have no file"
            causes.setdefault(f"{problem}; the first is {count.missing}", []).append(name)
        for reason, number in sorted(count.left_out.items()):
            if reason != "unresolved":
                causes.setdefault(f"left out, {reason}: {REASONS[reason]}", []).append(f"{name} ({number:,})")
    lines = [_aligned(["entry", "dialogues", "media", "found", "resolves", "from"], rows)]
    for cause, names in causes.items():
        shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
        lines += ["", f"{len(names)} {'entry' if len(names) == 1 else 'entries'}: {cause}", f"  {', '.join(shown)}"]
    return "\n".join([*lines, "", f"{len(rows)} entries, {len(rows) - unresolved} resolved, {unresolved} unresolved"])


def shard_counts(record: Mapping[str, Any]) -> str:
    """How many shards a build wrote, by folder."""
    counts = record["shards"]
    return (
        ", ".join(f"{counts[folder]} {folder}" for folder in ("video", "image", "dialogue") if folder in counts)
        or "none"
    )


def _short(text: str, width: int) -> str:
    """``text``, cut to ``width`` characters by leaving out some before its last third."""
    tail = width // 3
    return text if len(text) <= width else f"{text[: width - tail - 3]}...{text[-tail:]}"


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
