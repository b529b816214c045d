"""Terminal summary of a finished build: counts by entry, and reasons for what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.shards.ledger import RETRYABLE
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


def lost_entries(record: Mapping[str, Any], ledger: pa.Table) -> str:
    """Say in one line which entries have no dialogue in the shards although some were asked, and mostly why.

    Entries whose dialogues are all ``unresolved`` do not count, because ``--skip-unresolved`` left them out on purpose.

    Returns:
        Empty text if no entry is lost.
    """
    lost = [entry for entry in record["entries"] if not entry["dialogues"] and set(_left_out(entry)) - {"unresolved"}]
    if not lost:
        return ""
    names, reasons = [entry["name"] for entry in lost], Counter[str]()
    for entry in lost:
        reasons.update(_left_out(entry))
    reason, count = reasons.most_common(1)[0]
    rows = ledger.filter(pc.and_(pc.equal(ledger["reason"], reason), pc.is_in(ledger["entry"], pa.array(names))))
    media = rows.filter(pc.equal(rows["kind"], "media"))  # name the fix; their dialogues only refer to them
    message = (media if len(media) else rows)["message"][0].as_py()
    planned, remaining = sum(reasons.values()), len(names) - 1
    of = "the stage" if len(lost) == len(record["entries"]) else f"entry {names[0]}"
    of += f" and {remaining} more" if remaining and of != "the stage" else ""
    fix = "correct this and build into another --out"
    if reason in RETRYABLE:
        fix = "correct the files and add --retry-failed, or correct the manifest and build into another --out"
    return f"none of the {planned:,} dialogues of {of} was built, {count:,} because of {reason}: {message}; {fix}"


def _left_out(entry: Mapping[str, Any]) -> Mapping[str, int]:
    return entry["left_out"].get("dialogue", {})


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
