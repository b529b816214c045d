"""Terminal summary of a finished build: counts by entry, and reasons for what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from framestream.tools.common.text_table import format_bytes, format_table

COUNTS = ("planned", "dialogues", "media", "frames", "bytes")  #: of an entry, in the order of the columns
#: Names of what ledger rows are about, by their kind.
NAMES = {"entry": "entries", "dialogue": "dialogues", "media": "media", "salvaged": "partly recovered media"}


def build_summary(record: Mapping[str, Any]) -> str:
    """Format the table of a finished build from its build.json: one line for each entry, and a total."""
    total: dict[str, int] = dict.fromkeys(COUNTS, 0)
    left_out: dict[str, Counter[str]] = {}
    rows = []
    for entry in record["entries"]:
        for name in COUNTS:
            total[name] += entry[name]
        for kind, reasons in entry["left_out"].items():
            left_out.setdefault(kind, Counter()).update(reasons)
        rows.append([entry["name"], *_cells(entry, entry["left_out"])])
    rows.append(["total", *_cells(total, left_out)])
    return format_table(["entry", *COUNTS, "left out"], rows)


def _cells(counts: Mapping[str, int], left_out: Mapping[str, Mapping[str, int]]) -> list[str]:
    numbers = [f"{counts[name]:,}" for name in COUNTS if name != "bytes"]
    return [*numbers, format_bytes(counts["bytes"]), _reasons(left_out)]


def first_messages(ledger: pa.Table) -> str:
    """Format one line for each reason in a ledger: how many media, dialogues or entries have it, and the first message.

    Dialogues that are left out because of their media are not repeated.
    """
    columns = [("message", "count"), ("source", "first"), ("message", "first")]
    groups = ledger.group_by(["kind", "reason"], use_threads=False).aggregate(columns).to_pylist()
    media_reasons = {group["reason"] for group in groups if group["kind"] in ("media", "entry")}
    lines = []
    for group in groups:
        kind, reason, count = group["kind"], group["reason"], group["message_count"]
        if kind == "dialogue" and reason in media_reasons:
            continue
        source, message = group["source_first"], group["message_first"]
        first = message if PurePosixPath(source).name in message else f"{source}: {message}"
        what = kind if count == 1 and kind in ("entry", "dialogue") else NAMES[kind]
        lines.append(f"  {reason}: {count:,} {what}, {'' if count == 1 else 'first '}{first}")
    return "\n".join(sorted(lines))


def shard_counts(record: Mapping[str, Any]) -> str:
    """Format how many shards a build wrote, by folder."""
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
