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

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipeline.annotations import Annotation, AnnotationError, MediaRef, read_annotations
from pipeline.files import write_atomic
from pipeline.ledger import SCHEMA as LEDGER_SCHEMA
from pipeline.ledger import LedgerRow
from pipeline.manifest import Frames, Manifest
from pipeline.sampling import frame_indices
from pipeline.shard_format import dialogue_key, json_text, media_key
from tools.roots import BuildError, Origin, Place
from tools.tables import TableWriter, map_table, write_table

BYTES_PER_PIXEL = 0.37  #: of a stored frame: JPEG of quality 90, measured on 720p footage reduced to 224 pixels
STILL_BYTES = 150_000  #: assumed for a still
DIALOGUE_BYTES = 1536  #: tar headers and fixed fields of a dialogue
UNKNOWN_SECONDS = 60  #: assumed where an annotation does not say how long its video is
TASK_SAMPLES = 10_000  #: at most in one shard

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
        ("task", pa.int32()),
    ]
)
#: Last column of media.arrow: rows of dialogues.arrow that are about this media item alone.
ALONE = pa.field("dialogues", pa.list_(pa.int64()))


@dataclass(slots=True)
class EntryCount:
    """What the plan found of one entry."""

    samples: int = 0  #: that the sampling strategy takes
    dialogues: int = 0  #: usable ones
    media: int = 0  #: distinct, named here first
    found: int = 0  #: of those, how many have a file (dry run only)
    missing: str = ""  #: the first that has none (dry run only)
    left_out: Counter[str] = field(default_factory=Counter)  #: samples, or the entry itself, by reason
    cause: str = ""  #: why the first of them was left out


def make_plan(
    manifest: Manifest, found: list[Origin], folder: Path | None, limit: int | None = None, strict: bool = True
) -> dict[str, EntryCount]:
    """Read all annotation files and write the plan to ``folder``; with None only count (and look for the media).

    Args:
        strict: refuse entries that cannot be resolved; otherwise their dialogues with media become ledger rows.

    Raises:
        AnnotationFileError: an annotation file is broken.
        BuildError: ``strict``, and an entry's annotation file or media are not here; no dialogue at all to write.
    """
    for origin in found:
        if strict and origin.annotation.path is None:
            raise BuildError(_unresolved(origin, origin.annotation))
    plan = _Plan(manifest, folder)
    for origin in tqdm(found, desc="plan", unit=" entries", disable=None, leave=False):
        entry = origin.entry
        count = plan.counts[entry.name] = EntryCount()
        if origin.annotation.path is None:
            plan.leave_out(LedgerRow(entry.name, "entry", "unresolved", origin.annotation.missing))
            continue
        samples = read_annotations(
            origin.annotation.path,
            entry,
            placeholder=manifest.data.text_placeholder,
            seed=manifest.seed,
            limit=limit,
            compat=manifest.compat,
        )
        for sample in samples:
            if isinstance(sample, Annotation) and sample.media and origin.media.path is None:
                if strict:
                    raise BuildError(_unresolved(origin, origin.media))
                sample = AnnotationError("unresolved", origin.media.missing, sample.entry, sample.position, sample.id)
            plan.add(origin, sample)
        if not count.samples:
            message = f"{origin.annotation.path}: no samples (sampling {entry.sampling})"
            plan.leave_out(LedgerRow(entry.name, "entry", "empty_annotation", message))
    if folder is not None:
        if not any(count.dialogues for count in plan.counts.values()):
            raise BuildError(f"no dialogue can be used: {_causes(plan.counts)}; correct the files, or data.entries")
        plan.write()
    return plan.counts


def _unresolved(origin: Origin, place: Place) -> str:
    return f"entry {origin.entry.name}: {place.missing}; or leave it out with --skip-unresolved"


def _causes(counts: Mapping[str, EntryCount], shown: int = 3) -> str:
    """Why entries give no dialogue: the first cause of the first of them."""
    texts = [f"entry {name}: {count.cause}" for name, count in counts.items()]
    more = [f"{len(texts) - shown} more entries"] if len(texts) > shown else []
    return ", ".join([*texts[:shown], *more])


class _Plan:
    """A plan while annotations are read."""

    def __init__(self, manifest: Manifest, folder: Path | None) -> None:
        self._frames = manifest.frames
        self._folder = folder
        self.counts: dict[str, EntryCount] = {}
        self._tasks = _Tasks(manifest.data.shard_mb * 1_000_000)
        self._rows: dict[bytes, int] = {}  # digest of what a media item really is -> its row
        self._alone = (array("q"), array("q"))  # rows of media and of the dialogues about them alone
        self._dialogues = TableWriter(DIALOGUES, folder and folder / "dialogues.arrow")
        self._media = TableWriter(MEDIA, folder and folder / "distinct.arrow")
        self._ledger = TableWriter(LEDGER_SCHEMA, folder and folder / "ledger.arrow")

    def leave_out(self, row: LedgerRow) -> None:
        count = self.counts[row.entry]
        count.left_out[row.reason] += 1
        count.cause = count.cause or row.message
        self._ledger.add(row.columns())

    def add(self, origin: Origin, sample: Annotation | AnnotationError) -> None:
        entry = origin.entry
        self.counts[entry.name].samples += 1
        source = f"{entry.annotation}#{sample.position}"
        key = dialogue_key(json_text([entry.name, sample.position]))
        if isinstance(sample, AnnotationError):
            self.leave_out(
                LedgerRow(
                    entry.name, "dialogue", sample.reason, str(sample), dialogue=sample.id, key=key, source=source
                )
            )
            return
        media = [self._media_row(origin, ref, sample) for ref in sample.media]
        conversations = json_text(sample.turns)
        if len(media) == 1:
            self._alone[0].append(media[0])
            self._alone[1].append(self._dialogues.rows)
        self._dialogues.add(
            {
                "key": key,
                "split": entry.split,
                "entry": entry.name,
                "id": sample.id,
                "source": source,
                "media": media,
                "conversations": conversations,
                "meta": json_text(sample.meta),
                "task": self._tasks.put("dialogue", entry.split, len(conversations) + DIALOGUE_BYTES),
            }
        )
        self.counts[entry.name].dialogues += 1

    def _media_row(self, origin: Origin, ref: MediaRef, sample: Annotation) -> int:
        what = f"{ref.kind}\0{origin.media.path}/{ref.path}\0{ref.reader}\0{ref.start}\0{ref.end}"
        digest = hashlib.blake2b(what.encode(), digest_size=16).digest()
        row = self._rows.setdefault(digest, self._media.rows)
        if row == self._media.rows:
            count = self.counts[origin.entry.name]
            count.media += 1
            if self._folder is None:
                here = os.path.exists(origin.media.path / ref.path)
                count.found += here
                count.missing = count.missing or ("" if here else str(origin.media.path / ref.path))
            size = STILL_BYTES if ref.kind == "image" else _video_bytes(self._frames, ref, sample.meta.get("duration"))
            identity = json_text([origin.media.name, ref.path, ref.reader, ref.start, ref.end])
            self._media.add(
                {
                    "key": media_key(ref.kind, identity),
                    "kind": ref.kind,
                    "split": origin.entry.split,
                    "entry": origin.number,
                    "path": ref.path,
                    "reader": ref.reader,
                    "start": ref.start,
                    "end": ref.end,
                    "source": ref.source,
                    "task": self._tasks.put(ref.kind, origin.entry.split, size),
                }
            )
        return row

    def write(self) -> None:
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
        samples = {name: count.samples for name, count in self.counts.items()}
        tasks = {"tasks": self._tasks.names, "samples": samples}
        write_atomic(self._folder / "tasks.json", json_text(tasks).encode())


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


def _video_bytes(frames: Frames, ref: MediaRef, duration: Any) -> int:
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
def _frames_of(frames: Frames, seconds: int) -> int:
    """Frames that the sampler takes of a video of 25 frames a second."""
    sampler = "middle" if frames.sampler == "rand" else frames.sampler
    taken = frame_indices(sampler, seconds * 25, 25.0, seconds, frames.min, frames.max, frames.clip_frames)
    return len(np.unique(taken))
