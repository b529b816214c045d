"""Plan a build: all dialogues, the distinct media they name, and which task builds each of them.

Annotation files are read once, as streams, into three Arrow files in a work folder::

    dialogues.arrow   one row for each usable dialogue, in plan order (entries as in the manifest, then file order)
    media.arrow       one row for each distinct media item (source, clip, reader), in first-seen order
    ledger.arrow      one row for each sample that cannot be used
    tasks.json        the names of the tasks, and the number of samples by entry

A task is one shard. Its contents are decided here from estimated frames and text lengths, never from encoded bytes, so
they do not depend on the machine that builds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, MediaRef
from framestream.pipeline.annotations.reader import read_annotations
from framestream.pipeline.config.data import FOLDER_READERS, EntryConfig
from framestream.pipeline.config.manifest import BuildManifest
from framestream.pipeline.shards.ledger import LedgerRow
from framestream.tools.builder.availability import AvailabilityChecker
from framestream.tools.builder.incremental import Selection
from framestream.tools.builder.plan_tables import PlanTables, sample_key, sample_source
from framestream.tools.builder.unique_ids import UniqueIds
from framestream.tools.common.errors import BuildError
from framestream.tools.fetch.base import UNKNOWN
from framestream.tools.fetch.root_map import ResolvedEntry, ResolvedLocation

BATCH_SAMPLES = 8192  #: dialogues whose media get their ids together


@dataclass(slots=True)
class PlannedEntry:
    """Counts of one entry in a plan. Only a dry run checks whether media exist."""

    samples: int = 0  #: selected by the sampling strategy
    dialogues: int = 0  #: usable samples
    media: int = 0  #: distinct media that this entry names first
    found: int = 0  #: of those, how many exist
    bytes: int = 0  #: of their files, each counted once, where the size is known
    unsized: int = 0  #: existing files of unknown size
    missing: Counter[str] = field(default_factory=Counter)  #: media that were not found, by reason
    first_messages: dict[str, str] = field(default_factory=dict)  #: message of the first of them, by reason
    left_out: Counter[str] = field(default_factory=Counter)  #: samples, or the entry itself, by reason
    cause: str = ""  #: why the first of them was left out


def make_plan(
    manifest: BuildManifest,
    entries: Sequence[ResolvedEntry],
    folder: Path | None,
    limit: int | None = None,
    strict: bool = True,
    selection: Selection | None = None,
) -> dict[str, PlannedEntry]:
    """Read all annotation files and write the plan to ``folder``. With None, only count, and check the media.

    Args:
        strict: refuse entries that cannot be resolved; otherwise their dialogues with media become ledger rows.
        selection: the samples that an addition to a finished root plans; None for all.

    Returns:
        The counts of each entry that ``selection`` includes; nothing if there is nothing to retry.

    Raises:
        AnnotationFileError: an annotation file is broken.
        BuildError: an entry's annotation file or media are missing (if ``strict``), or no dialogue can be used.
    """
    entries = [item for item in entries if selection is None or selection.includes_entry(item.entry.name)]
    if strict:
        _require_annotations(entries)
    tables = PlanTables(manifest, folder, selection) if folder else None
    with AvailabilityChecker() as checker:
        planner = _Planner(tables, checker, selection)
        for resolved in tqdm(entries, desc="plan", unit=" entries", disable=None, leave=False):
            _read_entry(planner, manifest, resolved, limit, strict)
        planner.flush()
    counts = planner.counts
    if tables is None:
        return counts
    if not any(count.samples for count in counts.values()) and _is_retry(counts, selection):
        return {}
    if not any(count.dialogues for count in counts.values()):
        raise BuildError(f"no dialogue can be used: {_causes(counts)}; correct the files, or data.entries")
    tables.write({name: count.samples for name, count in counts.items()})
    return counts


def _require_annotations(entries: Sequence[ResolvedEntry]) -> None:
    for resolved in entries:
        if not resolved.annotation.resolved:
            raise BuildError(_unresolved(resolved, resolved.annotation))


def _is_retry(names: Iterable[str], selection: Selection | None) -> bool:
    """Return whether a plan only retries failed samples of the entries ``names``."""
    return selection is not None and not any(map(selection.is_new, names))


def _read_entry(
    planner: _Planner, manifest: BuildManifest, resolved: ResolvedEntry, limit: int | None, strict: bool
) -> None:
    entry, file = resolved.entry, resolved.annotation.path
    planner.counts[entry.name] = PlannedEntry()
    if file is None:
        planner.leave_out(LedgerRow(entry.name, "entry", "unresolved", resolved.annotation.missing))
        return
    samples = read_annotations(
        file,
        entry,
        placeholder=manifest.data.text_placeholder,
        seed=manifest.seed,
        limit=limit,
        compat=manifest.compat,
    )
    empty = True
    for sample in samples:
        empty = False
        if strict and isinstance(sample, Annotation) and sample.media and not resolved.media.resolved:
            raise BuildError(_unresolved(resolved, resolved.media))
        planner.add(resolved, sample)
    if empty:
        message = f"{entry.annotation}: no samples (sampling {entry.sampling})"
        planner.leave_out(LedgerRow(entry.name, "entry", "empty_annotation", message))


def _unresolved(resolved: ResolvedEntry, location: ResolvedLocation) -> str:
    return f"entry {resolved.entry.name}: {location.missing}; or leave it out with --skip-unresolved"


def _causes(counts: Mapping[str, PlannedEntry], shown: int = 3) -> str:
    """Say why the first ``shown`` entries have no dialogue: the first cause of each."""
    texts = [f"entry {name}: {count.cause}" for name, count in counts.items()]
    more = [f"{len(texts) - shown} more entries"] if len(texts) > shown else []
    return ", ".join([*texts[:shown], *more])


class _Planner:
    """Plans dialogues while annotations are read, in batches whose media get their ids together.

    With ``tables`` the plan is written to them. Without, the media are checked with ``checker``.
    """

    def __init__(self, tables: PlanTables | None, checker: AvailabilityChecker, selection: Selection | None) -> None:
        self._tables = tables
        self._selection = selection
        self._checker = checker
        self._media_ids = UniqueIds()
        self._batch: list[tuple[ResolvedEntry, Annotation]] = []
        self.counts: dict[str, PlannedEntry] = {}

    def leave_out(self, row: LedgerRow) -> None:
        """Count a sample or an entry that is left out."""
        count = self.counts[row.entry]
        count.left_out[row.reason] += 1
        count.cause = count.cause or row.message
        if self._tables:
            self._tables.leave_out(row)

    def add(self, resolved: ResolvedEntry, sample: Annotation | AnnotationError) -> None:
        """Add one sample of an entry, or leave it out."""
        entry = resolved.entry
        if self._selection and not self._selection.includes_dialogue(entry.name, sample_key(entry, sample.position)):
            return
        self.counts[entry.name].samples += 1
        if isinstance(sample, AnnotationError):
            self._leave_out_sample(entry, sample, sample.reason, str(sample))
            return
        if sample.media and not resolved.media.resolved:
            self._leave_out_sample(entry, sample, "unresolved", resolved.media.missing)
            if self._tables:
                return  # only a dry run also counts media without a location
        else:
            self.counts[entry.name].dialogues += 1
        self._batch.append((resolved, sample))
        if len(self._batch) == BATCH_SAMPLES:
            self.flush()

    def _leave_out_sample(
        self, entry: EntryConfig, sample: Annotation | AnnotationError, reason: str, message: str
    ) -> None:
        key, source = sample_key(entry, sample.position), sample_source(entry, sample)
        self.leave_out(LedgerRow(entry.name, "dialogue", reason, message, dialogue=sample.id, key=key, source=source))

    def flush(self) -> None:
        """Give ids to the media of the batch, in first-seen order, then write or check them."""
        media = [(resolved, ref) for resolved, sample in self._batch for ref in sample.media]
        rows, first = (column.tolist() for column in self._media_ids.assign([_identity(*item) for item in media]))
        for (resolved, _), is_new in zip(media, first, strict=True):
            self.counts[resolved.entry.name].media += is_new
        if self._tables:
            self._write_batch(self._tables, rows, first)
        else:
            self._check_media([item for item, is_new in zip(media, first, strict=True) if is_new])
        self._batch.clear()

    def _write_batch(self, tables: PlanTables, rows: list[int], first: list[bool]) -> None:
        """Write the batch. ``rows`` are the media ids of all its dialogues, ``first`` whether each is seen first."""
        start = 0
        for resolved, sample in self._batch:
            for number, ref in enumerate(sample.media, start):
                if first[number]:
                    tables.add_media(resolved, ref, sample.meta.get("duration"))
            end = start + len(sample.media)
            tables.add_dialogue(resolved.entry, sample, rows[start:end])
            start = end

    def _check_media(self, media: list[tuple[ResolvedEntry, MediaRef]]) -> None:
        queries = [(resolved.media, ref.path, ref.reader in FOLDER_READERS) for resolved, ref in media]
        for (resolved, _), availability in zip(media, self._checker.check(queries), strict=True):
            count = self.counts[resolved.entry.name]
            if availability.reason:
                count.missing[availability.reason] += 1
                count.first_messages.setdefault(availability.reason, availability.message)
                continue
            count.found += 1
            if availability.is_new:
                count.unsized += availability.size == UNKNOWN
                count.bytes += max(availability.size, 0)


def _identity(resolved: ResolvedEntry, ref: MediaRef) -> str:
    """Return what identifies a media item, independent of the name of its root."""
    folder = resolved.media.path or resolved.media.origin
    return f"{ref.kind}\0{folder}/{ref.path}\0{ref.reader}\0{ref.start}\0{ref.end}"
