"""The Arrow files of a plan while they are written, and the assignment of samples to tasks. See ``planner.py``."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, MediaRef
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.manifest import BuildManifest
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.sampling import frame_indices
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.pipeline.shards.ledger import LedgerRow
from framestream.pipeline.shards.samples import dialogue_key, media_key
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.builder.incremental import MediaStatus, Selection
from framestream.tools.common.arrow_files import TableWriter, map_table, write_table
from framestream.tools.fetch.root_map import ResolvedEntry

BYTES_PER_PIXEL = 0.37  #: of a stored frame: JPEG of quality 90, measured on 720p footage reduced to 224 pixels
IMAGE_BYTES = 150_000  #: estimate for an image
DIALOGUE_BYTES = 1536  #: tar headers and fixed fields of a dialogue
UNKNOWN_SECONDS = 60  #: assumed if an annotation does not state the duration of its video
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
        ("entry", pa.int32()),  # number of the first entry that names it
        ("path", pa.string()),
        ("reader", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("source", pa.string()),
        ("task", pa.int32()),  # -1 if nothing is to be built
        ("built", pa.int32()),  # row in the index of the root that the plan adds to; -1 if it is not there
        ("failed", pa.string()),  # why that root does not have it, if this is final; else empty
        ("attempts", pa.int32()),  # failed attempts for that root
    ]
)
#: Last column of media.arrow: rows of the dialogues that have this item as their only media, and are of its split.
SOLE_DIALOGUES = pa.field("dialogues", pa.list_(pa.int64()))


def sample_key(entry: EntryConfig, position: int) -> str:
    """Return the key of an entry's sample, from its name and the position in its file."""
    return dialogue_key(f"[{_quoted(entry.name)},{position}]")


@lru_cache
def _quoted(name: str) -> str:
    return canonical_json(name)


def sample_source(entry: EntryConfig, sample: Annotation | AnnotationError) -> str:
    """Return where a sample comes from, as ANNOTATION#POSITION."""
    return f"{entry.annotation}#{sample.position}"


class PlanTables:
    """The files of a plan while they are written."""

    def __init__(self, manifest: BuildManifest, folder: Path, selection: Selection | None) -> None:
        self._selection = selection
        self._frames = manifest.frames
        self._folder = folder
        self._tasks = _TaskAssigner(manifest.data.shard_mb * 1_000_000)
        self._sole_media, self._sole_dialogues = array("q"), array("q")  # row pairs of SOLE_DIALOGUES
        self._media_is_val = array("b")  # by row of the media
        self._dialogues = TableWriter(DIALOGUES, folder / "dialogues.arrow")
        self._media = TableWriter(MEDIA, folder / "distinct.arrow")
        self._ledger = TableWriter(LEDGER_SCHEMA, folder / "ledger.arrow")

    def leave_out(self, row: LedgerRow) -> None:
        """Add a row to the ledger."""
        self._ledger.add(row.columns())

    def add_dialogue(self, entry: EntryConfig, sample: Annotation, media: list[int]) -> None:
        """Add a dialogue about the ``media`` rows."""
        conversations = canonical_json(sample.turns)
        if len(media) == 1 and self._media_is_val[media[0]] == (entry.split == "val"):
            self._sole_media.append(media[0])
            self._sole_dialogues.append(self._dialogues.rows)
        self._dialogues.add(
            {
                "key": sample_key(entry, sample.position),
                "split": entry.split,
                "entry": entry.name,
                "id": sample.id,
                "source": sample_source(entry, sample),
                "media": media,
                "conversations": conversations,
                "meta": canonical_json(sample.meta),
                "task": self._tasks.assign("dialogue", entry.split, len(conversations) + DIALOGUE_BYTES),
            }
        )

    def add_media(self, resolved: ResolvedEntry, ref: MediaRef, duration: Any) -> None:
        """Add a media item. ``duration`` is what its annotation states: seconds, or anything else."""
        self._media_is_val.append(resolved.entry.split == "val")
        size = IMAGE_BYTES if ref.kind == "image" else _video_bytes(self._frames, ref, duration)
        key = media_key(ref.kind, canonical_json([resolved.media.name, ref.path, ref.reader, ref.start, ref.end]))
        status = self._selection.media_status(key) if self._selection else MediaStatus()
        final = status.built >= 0 or status.failed
        self._media.add(
            {
                "key": key,
                "kind": ref.kind,
                "split": resolved.entry.split,
                "entry": resolved.number,
                "path": ref.path,
                "reader": ref.reader,
                "start": ref.start,
                "end": ref.end,
                "source": ref.source,
                "task": -1 if final else self._tasks.assign(ref.kind, resolved.entry.split, size),
                "built": status.built,
                "failed": status.failed,
                "attempts": status.attempts,
            }
        )

    def write(self, samples: Mapping[str, int]) -> None:
        """Finish the tables and write tasks.json. ``samples`` are the numbers of samples by entry."""
        self._dialogues.close()
        self._ledger.close()
        self._media.close()
        media = map_table(self._folder / "distinct.arrow", checked=True)
        about, dialogues = (np.array(rows, dtype=np.int64) for rows in (self._sole_media, self._sole_dialogues))
        order = np.argsort(about, kind="stable")  # dialogues in plan order within each media item
        starts = np.searchsorted(about[order], np.arange(len(media) + 1)).astype(np.int64)
        lists = pa.LargeListArray.from_arrays(starts, dialogues[order]).cast(SOLE_DIALOGUES.type)
        write_table(self._folder / "media.arrow", media.append_column(SOLE_DIALOGUES, lists))
        (self._folder / "distinct.arrow").unlink()
        tasks = {"tasks": self._tasks.names, "samples": samples}
        write_atomic(self._folder / "tasks.json", canonical_json(tasks).encode())


class _TaskAssigner:
    """Opens tasks and numbers them. Each takes samples up to ``limit`` estimated bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.names: list[str] = []  #: FOLDER-SPLIT-NUMBER of each task
        self._open: dict[tuple[str, str], list[int]] = {}  # number, bytes and samples of each open task
        self._opened: Counter[tuple[str, str]] = Counter()

    def assign(self, folder: str, split: str, size: int) -> int:
        """Return the task of a sample of ``size`` estimated bytes."""
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
    """Estimate the bytes of a video in its shard."""
    if ref.end is not None:
        seconds = ref.end - (ref.start or 0)
    else:
        try:
            seconds = float(duration) - (ref.start or 0)
        except (TypeError, ValueError):
            seconds = UNKNOWN_SECONDS
    is_nan = seconds != seconds
    whole_seconds = UNKNOWN_SECONDS if is_nan else int(min(max(seconds, 1), 1 << 20))
    return round(_num_sampled_frames(frames, whole_seconds) * frames.size**2 * BYTES_PER_PIXEL)


@lru_cache(maxsize=4096)
def _num_sampled_frames(frames: FramesConfig, seconds: int) -> int:
    """Count the frames that the sampler selects from a video of 25 frames a second."""
    sampler = "middle" if frames.sampler == "rand" else frames.sampler
    indices = frame_indices(sampler, seconds * 25, 25.0, seconds, frames.min, frames.max, frames.clip_frames)
    return len(np.unique(indices))
