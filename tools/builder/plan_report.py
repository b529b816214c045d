"""Report of a dry run: what each entry would read, from where, and what is missing. Table, parquet and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.utils.atomic_io import atomic_file, write_atomic
from framestream.tools.builder.planner import PlannedEntry
from framestream.tools.common.text_table import format_bytes, format_table, truncate
from framestream.tools.fetch.root_map import ResolvedEntry

#: Columns of plan.parquet, which has one row for each entry, in the manifest's order.
SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("split", pa.string()),
        ("sampling", pa.string()),
        ("annotation", pa.string()),  # source of the annotation file, also if it is missing
        ("place", pa.string()),  # source of the media, also if it is missing
        ("resolved", pa.bool_()),  # annotation file available, and source of the media, if there are any, known
        ("dialogues", pa.int64()),  # selected by the sampling; null without annotation file, as are the next five
        ("usable", pa.int64()),  # of those, not left out
        ("media", pa.int64()),  # distinct media that no earlier entry names
        ("found", pa.int64()),  # of those, how many exist
        ("bytes", pa.int64()),  # of their files, where the size is known
        ("unsized", pa.int64()),  # files of unknown size
        (
            "problems",
            pa.list_(
                pa.struct(
                    [
                        ("about", pa.string()),  # annotation, root, media or dialogue
                        ("reason", pa.string()),  # as in the ledger
                        ("count", pa.int64()),  # media or dialogues; null if it is about the entry
                        ("message", pa.string()),
                    ]
                )
            ),
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of problem of an entry; see :data:`SCHEMA`."""

    about: str
    reason: str
    count: int | None
    message: str


@dataclass(frozen=True, slots=True)
class PlanRow:
    """The report of one entry; see :data:`SCHEMA`."""

    entry: str
    split: str
    sampling: str
    annotation: str
    place: str
    resolved: bool
    problems: tuple[Problem, ...]
    dialogues: int | None = None
    usable: int | None = None
    media: int | None = None
    found: int | None = None
    bytes: int | None = None
    unsized: int | None = None


def plan_rows(entries: Sequence[ResolvedEntry], counts: Mapping[str, PlannedEntry]) -> list[PlanRow]:
    """Return the rows of a dry run, in the order of ``entries``."""
    rows = []
    for resolved in entries:
        entry, count = resolved.entry, counts[resolved.entry.name]
        problems = tuple(_problems(resolved, count))
        row = PlanRow(
            entry=entry.name,
            split=entry.split,
            sampling=entry.sampling,
            annotation=resolved.annotation.origin,
            place=resolved.media.origin,
            resolved=not any(problem.about in ("annotation", "root") for problem in problems),
            problems=problems,
        )
        if resolved.annotation.resolved:
            row = replace(
                row,
                dialogues=count.samples,
                usable=count.dialogues,
                media=count.media,
                found=count.found,
                bytes=count.bytes,
                unsized=count.unsized,
            )
        rows.append(row)
    return rows


def _problems(resolved: ResolvedEntry, count: PlannedEntry) -> list[Problem]:
    problems = []
    if not resolved.annotation.resolved:
        problems.append(Problem("annotation", "unresolved", None, resolved.annotation.missing))
    if not resolved.media.resolved and (not resolved.annotation.resolved or "unresolved" in count.left_out):
        problems.append(Problem("root", "unresolved", None, resolved.media.missing))
    for reason, number in sorted(count.missing.items()):
        if reason != "unresolved" or resolved.media.resolved:
            problems.append(Problem("media", reason, number, count.first_messages[reason]))
    for reason, number in sorted(count.left_out.items()):
        if reason != "unresolved":
            problems.append(Problem("dialogue", reason, number, REASONS[reason]))
    return problems


def causes(rows: Sequence[PlanRow]) -> list[tuple[str, list[str]]]:
    """Return what is missing: each cause once, with the entries that it affects."""
    entries: dict[str, list[str]] = {}
    for row in rows:
        for problem in row.problems:
            text, name = problem.message, truncate(row.entry, 50)
            if problem.about == "media":
                text = f"{problem.count:,} of {row.media:,} media are not available ({problem.reason}); first {text}"
            if problem.about == "dialogue":
                text, name = f"left out, {problem.reason}: {text}", f"{name} ({problem.count:,})"
            entries.setdefault(text, []).append(name)
    return list(entries.items())


def totals(rows: Sequence[PlanRow]) -> str:
    """Format the sums of all entries as one line."""
    names = ("dialogues", "media", "found", "bytes")
    dialogues, media, found, size = (sum(getattr(row, name) or 0 for row in rows) for name in names)
    unsized = " and files of unknown size" if any(row.unsized for row in rows) else ""
    return (
        f"{dialogues:,} dialogues, {media:,} distinct media, {found:,} of them found with {format_bytes(size)}{unsized}"
    )


def plan_summary(rows: Sequence[PlanRow]) -> str:
    """Format the table of a dry run for the terminal, followed by what is missing, by cause."""
    cells = []
    for row in rows:
        numbers = ["?" if number is None else f"{number:,}" for number in (row.dialogues, row.media, row.found)]
        size = "?" if row.bytes is None else format_bytes(row.bytes) + ("+" if row.unsized else "")
        source = truncate(row.place or row.annotation, 39)
        cells.append([truncate(row.entry, 50), *numbers, size, "yes" if row.resolved else "no", source])
    lines = [format_table(["entry", "dialogues", "media", "found", "bytes", "resolved", "source"], cells)]
    for cause, names in causes(rows):
        shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
        lines += ["", f"{_entries(len(names))}: {cause}", f"  {', '.join(shown)}"]
    resolved = sum(row.resolved for row in rows)
    counts = f"{_entries(len(rows))}, {resolved} resolved, {len(rows) - resolved} unresolved"
    return "\n".join([*lines, "", totals(rows), counts])


def _entries(number: int) -> str:
    return "1 entry" if number == 1 else f"{number} entries"


def write_report(folder: Path, title: str, rows: Sequence[PlanRow]) -> None:
    """Write plan.parquet and plan.html to ``folder``, which is created if it is missing."""
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
