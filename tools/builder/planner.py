"""The plan of a build: all dialogues, the distinct media they name, and which task builds which of them.

Annotation files are read once, as streams, into three Arrow files in a work folder::

    dialogues.arrow   one row for each usable dialogue, in plan order (entries as in the manifest, then file order)
    media.arrow       one row for each distinct media item (source, clip, reader), in the order of first naming
    ledger.arrow      one row for each sample that cannot be used
    tasks.json        the names of the tasks, and the number of samples by entry

A task is one shard. What goes into it is decided here from estimated frames and text lengths, never from encoded
bytes, so that it is the same whoever builds it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, MediaRef
from framestream.pipeline.annotations.reader import read_annotations
from framestream.pipeline.config.data import FOLDER_READERS, EntryConfig
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.sampling import frame_indices
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.pipeline.shards.ledger import LedgerRow
from framestream.pipeline.shards.samples import dialogue_key, media_key
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.builder.availability import AvailabilityChecker
from framestream.tools.builder.incremental import MediaStatus, Selection
from framestream.tools.builder.unique_ids import UniqueIds
from framestream.tools.common.arrow_files import TableWriter, map_table, write_table
from framestream.tools.common.errors import BuildError
from framestream.tools.fetch.base import UNKNOWN
from framestream.tools.fetch.root_map import ResolvedEntry, ResolvedLocation

BYTES_PER_PIXEL = 0.37  #: of a stored frame: JPEG of quality 90, measured on 720p footage reduced to 224 pixels
STILL_BYTES = 150_000  #: assumed for a still
DIALOGUE_BYTES = 1536  #: tar headers and fixed fields of a dialogue
UNKNOWN_SECONDS = 60  #: assumed where an annotation does not say how long its video is
TASK_SAMPLES = 10_000  #: at most in one shard
BATCH_SAMPLES = 8192  #: dialogues whose media are numbered together

DIALOGUES = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("entry", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),  # ANNOTATION#POSITION
        ("media", pa.list_(pa.int32())),  # rows of media.arrow
        ("conversations", pa.string()),
        ("meta", pa.string()),
        ("task", pa.int32()),
    ]
)
MEDIA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("split", pa.string()),
        ("entry", pa.int32()),  # number of the entry that names it first
        ("path", pa.string()),
        ("reader", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("source", pa.string()),
        ("task", pa.int32()),  # -1 where nothing is to be built
        ("built", pa.int32()),  # row in the index of the root that the plan adds to; -1: not in it
        ("failed", pa.string()),  # why that root has not built it, if that is final; else empty
        ("attempts", pa.int32()),  # made by then
    ]
)
#: Last column of media.arrow: rows of dialogues.arrow that are about this media item alone, and of its split.
ALONE = pa.field("dialogues", pa.list_(pa.int64()))


@dataclass(slots=True)
class PlannedEntry:
    """What the plan found of one entry; its media are looked for by a dry run alone."""

    samples: int = 0  #: that the sampling strategy takes
    dialogues: int = 0  #: usable ones
    media: int = 0  #: distinct, named here first
    found: int = 0  #: of those, how many are at their place
    bytes: int = 0  #: of their files, each counted once, where the place tells
    unsized: int = 0  #: files found whose place does not tell
    lacking: Counter[str] = field(default_factory=Counter)  #: media that are not found, by reason
    example: dict[str, str] = field(default_factory=dict)  #: what was said of the first of them, by reason
    left_out: Counter[str] = field(default_factory=Counter)  #: samples, or the entry itself, by reason
    cause: str = ""  #: why the first of them was left out


def make_plan(
    manifest: Manifest,
    found: Sequence[ResolvedEntry],
    folder: Path | None,
    limit: int | None = None,
    strict: bool = True,
    selection: Selection | None = None,
) -> dict[str, PlannedEntry]:
    """Read all annotation files and write the plan to ``folder``; with None only count, and look for the media.

    Args:
        strict: refuse entries that cannot be resolved; otherwise their dialogues with media become ledger rows.
        selection: what of the samples an addition to a finished root takes; all if None.

    Returns:
        What was found of each entry; of those that ``selection`` takes none of, nothing.

    Raises:
        AnnotationFileError: an annotation file is broken.
        BuildError: ``strict``, and an entry's annotation file or media are not here; no dialogue at all to write.
    """
    found = [origin for origin in found if selection is None or selection.entry(origin.entry.name)]
    for origin in found:
        if strict and not origin.annotation.resolved:
            raise BuildError(_unresolved(origin, origin.annotation))
    with AvailabilityChecker() as survey:
        tables = folder and _Tables(manifest, folder, selection)
        plan = _Planner(tables, survey, selection)
        for origin in tqdm(found, desc="plan", unit=" entries", disable=None, leave=False):
            _read_entry(plan, manifest, origin, limit, strict)
        plan.flush()
    if tables:
        retried = selection is not None and not any(selection.is_new(name) for name in plan.counts)
        if retried and not any(count.samples for count in plan.counts.values()):
            return {}
        if not any(count.dialogues for count in plan.counts.values()):
            raise BuildError(f"no dialogue can be used: {_causes(plan.counts)}; correct the files, or data.entries")
        tables.write({name: count.samples for name, count in plan.counts.items()})
    return plan.counts


def _read_entry(plan: _Planner, manifest: Manifest, origin: ResolvedEntry, limit: int | None, strict: bool) -> None:
    entry, file = origin.entry, origin.annotation.path
    plan.counts[entry.name] = PlannedEntry()
    if file is None:
        plan.leave_out(LedgerRow(entry.name, "entry", "unresolved", origin.annotation.missing))
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
        if strict and isinstance(sample, Annotation) and sample.media and not origin.media.resolved:
            raise BuildError(_unresolved(origin, origin.media))
        plan.add(origin, sample)
    if empty:
        message = f"{file}: no samples (sampling {entry.sampling})"
        plan.leave_out(LedgerRow(entry.name, "entry", "empty_annotation", message))


def _unresolved(origin: ResolvedEntry, place: ResolvedLocation) -> str:
    return f"entry {origin.entry.name}: {place.missing}; or leave it out with --skip-unresolved"


def _causes(counts: Mapping[str, PlannedEntry], shown: int = 3) -> str:
    """Why entries give no dialogue: the first cause of the first of them."""
    texts = [f"entry {name}: {count.cause}" for name, count in counts.items()]
    more = [f"{len(texts) - shown} more entries"] if len(texts) > shown else []
    return ", ".join([*texts[:shown], *more])


class _Planner:
    """A plan while annotations are read: dialogues are gathered, and their media numbered in batches.

    With ``tables`` it is written; without, the media are looked for.
    """

    def __init__(self, tables: _Tables | None, survey: AvailabilityChecker, selection: Selection | None) -> None:
        self._tables = tables
        self._selection = selection
        self._survey = survey
        self._distinct = UniqueIds()
        self._gathered: list[tuple[ResolvedEntry, Annotation]] = []
        self.counts: dict[str, PlannedEntry] = {}

    def leave_out(self, row: LedgerRow) -> None:
        count = self.counts[row.entry]
        count.left_out[row.reason] += 1
        count.cause = count.cause or row.message
        if self._tables:
            self._tables.leave_out(row)

    def add(self, origin: ResolvedEntry, sample: Annotation | AnnotationError) -> None:
        entry = origin.entry
        if self._selection and not self._selection.dialogue(entry.name, _key(entry, sample.position)):
            return
        self.counts[entry.name].samples += 1
        error = sample if isinstance(sample, AnnotationError) else None
        if not error and sample.media and not origin.media.resolved:
            error = AnnotationError("unresolved", origin.media.missing)
        if error:
            names = {"dialogue": sample.id, "key": _key(entry, sample.position), "source": _source(entry, sample)}
            self.leave_out(LedgerRow(entry.name, "dialogue", error.reason, str(error), **names))
        else:
            self.counts[entry.name].dialogues += 1
        if not error or (not self._tables and error is not sample):  # media without a place are counted, too
            self._gathered.append((origin, sample))
            if len(self._gathered) == BATCH_SAMPLES:
                self.flush()

    def flush(self) -> None:
        """Number the media of the gathered dialogues in the order of their first naming."""
        media = [(origin, ref) for origin, sample in self._gathered for ref in sample.media]
        rows, first = (column.tolist() for column in self._distinct.assign([_identity(*item) for item in media]))
        for (origin, _), new in zip(media, first, strict=True):
            self.counts[origin.entry.name].media += new
        if not self._tables:
            self._look([item for item, new in zip(media, first, strict=True) if new])
        else:
            done = 0
            for origin, sample in self._gathered:
                for number, ref in enumerate(sample.media, done):
                    if first[number]:
                        self._tables.add_media(origin, ref, sample.meta.get("duration"))
                done += len(sample.media)
                self._tables.add_dialogue(origin.entry, sample, rows[done - len(sample.media) : done])
        self._gathered.clear()

    def _look(self, media: list[tuple[ResolvedEntry, MediaRef]]) -> None:
        wanted = [(origin.media, ref.path, ref.reader in FOLDER_READERS) for origin, ref in media]
        for (origin, _), answer in zip(media, self._survey.ask(wanted), strict=True):
            count = self.counts[origin.entry.name]
            if answer.reason:
                count.lacking[answer.reason] += 1
                count.example.setdefault(answer.reason, answer.message)
                continue
            count.found += 1
            if answer.new:
                count.unsized += answer.size == UNKNOWN
                count.bytes += max(answer.size, 0)


def _identity(origin: ResolvedEntry, ref: MediaRef) -> str:
    """What a media item really is, whatever its root is called."""
    place = origin.media.path or origin.media.origin
    return f"{ref.kind}\0{place}/{ref.path}\0{ref.reader}\0{ref.start}\0{ref.end}"


def _key(entry: EntryConfig, position: int) -> str:
    return dialogue_key(f"[{_quoted(entry.name)},{position}]")


@lru_cache
def _quoted(name: str) -> str:
    return canonical_json(name)


def _source(entry: EntryConfig, sample: Annotation | AnnotationError) -> str:
    return f"{entry.annotation}#{sample.position}"


# Tables ---------------------------------------------------------------------------------------------------------------


class _Tables:
    """The files of a plan while they are written."""

    def __init__(self, manifest: Manifest, folder: Path, selection: Selection | None) -> None:
        self._selection = selection
        self._frames = manifest.frames
        self._folder = folder
        self._tasks = _Tasks(manifest.data.shard_mb * 1_000_000)
        self._alone = (array("q"), array("q"))  # rows of media and of the dialogues of their split about them alone
        self._held_out = array("b")  # whether each media item is
        self._dialogues = TableWriter(DIALOGUES, folder / "dialogues.arrow")
        self._media = TableWriter(MEDIA, folder / "distinct.arrow")
        self._ledger = TableWriter(LEDGER_SCHEMA, folder / "ledger.arrow")

    def leave_out(self, row: LedgerRow) -> None:
        self._ledger.add(row.columns())

    def add_dialogue(self, entry: EntryConfig, sample: Annotation, media: list[int]) -> None:
        conversations = canonical_json(sample.turns)
        if len(media) == 1 and self._held_out[media[0]] == (entry.split == "val"):
            self._alone[0].append(media[0])
            self._alone[1].append(self._dialogues.rows)
        self._dialogues.add(
            {
                "key": _key(entry, sample.position),
                "split": entry.split,
                "entry": entry.name,
                "id": sample.id,
                "source": _source(entry, sample),
                "media": media,
                "conversations": conversations,
                "meta": canonical_json(sample.meta),
                "task": self._tasks.put("dialogue", entry.split, len(conversations) + DIALOGUE_BYTES),
            }
        )

    def add_media(self, origin: ResolvedEntry, ref: MediaRef, duration: Any) -> None:
        """Add a media item, of which its annotation says that it lasts ``duration`` seconds, or something else."""
        self._held_out.append(origin.entry.split == "val")
        size = STILL_BYTES if ref.kind == "image" else _video_bytes(self._frames, ref, duration)
        key = media_key(ref.kind, canonical_json([origin.media.name, ref.path, ref.reader, ref.start, ref.end]))
        known = self._selection.media(key) if self._selection else MediaStatus()
        settled = known.built >= 0 or known.failed
        self._media.add(
            {
                "key": key,
                "kind": ref.kind,
                "split": origin.entry.split,
                "entry": origin.number,
                "path": ref.path,
                "reader": ref.reader,
                "start": ref.start,
                "end": ref.end,
                "source": ref.source,
                "task": -1 if settled else self._tasks.put(ref.kind, origin.entry.split, size),
                "built": known.built,
                "failed": known.failed,
                "attempts": known.attempts,
            }
        )

    def write(self, samples: Mapping[str, int]) -> None:
        """End the tables, and name the tasks and the number of ``samples`` by entry."""
        self._dialogues.close()
        self._ledger.close()
        self._media.close()
        media = map_table(self._folder / "distinct.arrow")
        about, dialogues = (np.array(rows, dtype=np.int64) for rows in self._alone)
        order = np.argsort(about, kind="stable")  # dialogues in plan order within each media item
        starts = np.searchsorted(about[order], np.arange(len(media) + 1)).astype(np.int64)
        lists = pa.LargeListArray.from_arrays(starts, dialogues[order]).cast(ALONE.type)
        write_table(self._folder / "media.arrow", media.append_column(ALONE, lists))
        (self._folder / "distinct.arrow").unlink()
        tasks = {"tasks": self._tasks.names, "samples": samples}
        write_atomic(self._folder / "tasks.json", canonical_json(tasks).encode())


class _Tasks:
    """Numbers tasks as they are opened; each takes samples up to a number of estimated bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.names: list[str] = []  #: FOLDER-SPLIT-NUMBER of each task
        self._open: dict[tuple[str, str], list[int]] = {}  # task, bytes and samples in it
        self._opened: Counter[tuple[str, str]] = Counter()

    def put(self, folder: str, split: str, size: int) -> int:
        kind = folder, split
        current = self._open.get(kind)
        if not current or current[1] + size > self._limit or current[2] == TASK_SAMPLES:
            current = self._open[kind] = [len(self.names), 0, 0]
            self.names.append(f"{folder}-{split}-{self._opened[kind]:06d}")
            self._opened[kind] += 1
        current[1] += size
        current[2] += 1
        return current[0]


def _video_bytes(frames: FramesConfig, ref: MediaRef, duration: Any) -> int:
    """Estimated bytes of a video in its shard."""
    if ref.end is not None:
        seconds = ref.end - (ref.start or 0)
    else:
        try:
            seconds = float(duration) - (ref.start or 0)
        except (TypeError, ValueError):
            seconds = UNKNOWN_SECONDS
    whole = int(min(max(seconds, 1), 1 << 20)) if seconds == seconds else UNKNOWN_SECONDS
    return round(_frames_of(frames, whole) * frames.size**2 * BYTES_PER_PIXEL)


@lru_cache(maxsize=4096)
def _frames_of(frames: FramesConfig, seconds: int) -> int:
    """Frames that the sampler takes of a video of 25 frames a second."""
    sampler = "middle" if frames.sampler == "rand" else frames.sampler
    taken = frame_indices(sampler, seconds * 25, 25.0, seconds, frames.min, frames.max, frames.clip_frames)
    return len(np.unique(taken))
