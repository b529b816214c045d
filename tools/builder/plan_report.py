"""What a dry run found: by entry what would be read, from where, and what is missing; as table, parquet and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.utils.atomic_io import atomic_file, write_atomic
from framestream.tools.builder.planner import PlannedEntry
from framestream.tools.common.text_table import format_bytes, format_table, truncate
from framestream.tools.fetch.root_map import ResolvedEntry

#: plan.parquet: one row for each entry, in the manifest's order.
SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("split", pa.string()),
        ("sampling", pa.string()),
        ("annotation", pa.string()),  # what the annotation file is, or would be, read from
        ("place", pa.string()),  # what the media are, or would be, read from
        ("resolved", pa.bool_()),  # the annotation file is here, and the place of the media, if it has any, is known
        ("dialogues", pa.int64()),  # that the sampling takes; null where the annotation file is not here, as below
        ("usable", pa.int64()),  # of those, the ones that are not left out already
        ("media", pa.int64()),  # distinct, and named by no entry before
        ("found", pa.int64()),  # of those, the ones that are at their place
        ("bytes", pa.int64()),  # of their files, where their place tells
        ("unsized", pa.int64()),  # files whose place does not tell
        (
            "problems",
            pa.list_(
                pa.struct(
                    [
                        ("about", pa.string()),  # annotation, root, media or dialogue
                        ("reason", pa.string()),  # of the ledger
                        ("count", pa.int64()),  # media or dialogues; null where it is about the entry
                        ("message", pa.string()),
                    ]
                )
            ),
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that an entry lacks; see :data:`SCHEMA`."""

    about: str
    reason: str
    count: int | None
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """An entry; see :data:`SCHEMA`."""

    entry: str
    split: str
    sampling: str
    annotation: str
    place: str
    resolved: bool
    dialogues: int | None
    usable: int | None
    media: int | None
    found: int | None
    bytes: int | None
    unsized: int | None
    problems: tuple[Problem, ...]


def plan_rows(found: Sequence[ResolvedEntry], counts: Mapping[str, PlannedEntry]) -> list[Row]:
    """The rows of a dry run."""
    rows = []
    for origin in found:
        entry, count = origin.entry, counts[origin.entry.name]
        here = origin.annotation.resolved
        problems = tuple(_problems(origin, count))
        numbers = (count.samples, count.dialogues, count.media, count.found, count.bytes, count.unsized)
        rows.append(
            Row(
                entry.name,
                entry.split,
                entry.sampling,
                origin.annotation.origin,
                origin.media.origin,
                not any(problem.about in ("annotation", "root") for problem in problems),
                *(numbers if here else (None,) * len(numbers)),
                problems,
            )
        )
    return rows


def _problems(origin: ResolvedEntry, count: PlannedEntry) -> list[Problem]:
    problems = []
    if not origin.annotation.resolved:
        problems.append(Problem("annotation", "unresolved", None, origin.annotation.missing))
    if not origin.media.resolved and (not origin.annotation.resolved or "unresolved" in count.left_out):
        problems.append(Problem("root", "unresolved", None, origin.media.missing))
    for reason, number in sorted(count.lacking.items()):
        if reason != "unresolved" or origin.media.resolved:
            problems.append(Problem("media", reason, number, count.example[reason]))
    for reason, number in sorted(count.left_out.items()):
        if reason != "unresolved":
            problems.append(Problem("dialogue", reason, number, REASONS[reason]))
    return problems


def causes(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """What is missing, each cause once, with the entries that it concerns."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for problem in row.problems:
            text, name = problem.message, truncate(row.entry, 50)
            if problem.about == "media":
                text = f"{problem.count:,} of {row.media:,} media cannot be had ({problem.reason}); first {text}"
            if problem.about == "dialogue":
                text, name = f"left out, {problem.reason}: {text}", f"{name} ({problem.count:,})"
            found.setdefault(text, []).append(name)
    return list(found.items())


def totals(rows: Sequence[Row]) -> str:
    """The sums of all entries, as one line."""
    names = ("dialogues", "media", "found", "bytes")
    dialogues, media, found, size = (sum(getattr(row, name) or 0 for row in rows) for name in names)
    more = " and files of unknown size" if any(row.unsized for row in rows) else ""
    return f"{dialogues:,} dialogues, {media:,} distinct media, {found:,} of them found with {format_bytes(size)}{more}"


def plan_summary(rows: Sequence[Row]) -> str:
    """The table of a dry run for a terminal; then what is missing, by its cause."""
    cells = []
    for row in rows:
        numbers = ["?" if number is None else f"{number:,}" for number in (row.dialogues, row.media, row.found)]
        size = "?" if row.bytes is None else format_bytes(row.bytes) + ("+" if row.unsized else "")
        source = truncate(row.place or row.annotation, 39)
        cells.append([truncate(row.entry, 50), *numbers, size, "yes" if row.resolved else "no", source])
    lines = [format_table(["entry", "dialogues", "media", "found", "bytes", "resolves", "from"], cells)]
    for cause, names in causes(rows):
        shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
        lines += ["", f"{_entries(len(names))}: {cause}", f"  {', '.join(shown)}"]
    resolved = sum(row.resolved for row in rows)
    counts = f"{_entries(len(rows))}, {resolved} resolved, {len(rows) - resolved} unresolved"
    return "\n".join([*lines, "", totals(rows), counts])


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"


def write_report(folder: Path, title: str, rows: Sequence[Row]) -> None:
    """Write plan.parquet and plan.html to ``folder``, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "plan.parquet") as file:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), file)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = format_bytes
    page = environment.get_template("plan_report.html.j2").render(
        title=title, rows=rows, causes=causes(rows), totals=totals(rows)
    )
    write_atomic(folder / "plan.html", page.encode())
