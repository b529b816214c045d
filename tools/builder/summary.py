"""Tables for the terminal: what a build made of each entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from framestream.tools.common.text_table import format_bytes, format_table

#: What rows of the ledger are about, by their kind.
NAMES = {"entry": "entries", "dialogue": "dialogues", "media": "media", "salvaged": "media kept in part"}


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
        rows.append([entry["name"], *numbers, format_bytes(entry["bytes"]), _reasons(entry["left_out"])])
    numbers = [f"{total[name]:,}" for name in ("planned", "dialogues", "media", "frames")]
    rows.append(["total", *numbers, format_bytes(total["bytes"]), _reasons(left_out)])
    return format_table(["entry", "planned", "dialogues", "media", "frames", "bytes", "left out"], rows)


def first_of_reasons(ledger: pa.Table) -> str:
    """One line for each reason in a ledger: how many media, dialogues or entries have it, and what was said of the
    first. Dialogues that are left out because of their media are not told again."""
    columns = [("message", "count"), ("source", "first"), ("message", "first")]
    groups = ledger.group_by(["kind", "reason"], use_threads=False).aggregate(columns).to_pylist()
    other = {group["reason"] for group in groups if group["kind"] in ("media", "entry")}
    lines = []
    for group in groups:
        kind, reason, count = group["kind"], group["reason"], group["message_count"]
        if kind == "dialogue" and reason in other:
            continue
        source, message = group["source_first"], group["message_first"]
        first = message if PurePosixPath(source).name in message else f"{source}: {message}"
        what = kind if count == 1 and kind in ("entry", "dialogue") else NAMES[kind]
        lines.append(f"  {reason}: {count:,} {what}, {'' if count == 1 else 'first '}{first}")
    return "\n".join(sorted(lines))


def shard_counts(record: Mapping[str, Any]) -> str:
    """How many shards a build wrote, by folder."""
    counts = record["shards"]
    return (
        ", ".join(f"{counts[folder]} {folder}" for folder in ("video", "image", "dialogue") if folder in counts)
        or "none"
    )


def _reasons(left_out: Mapping[str, Mapping[str, int]]) -> str:
    parts = []
    for kind, reasons in left_out.items():
        parts += [f"{kind} {reason} {count:,}" for reason, count in reasons.items()]
    return ", ".join(parts)
