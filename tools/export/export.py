"""Export a shard root: media files first, then the annotation files, one for each split."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from tqdm import tqdm

from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.utils.atomic_io import atomic_file, write_atomic
from framestream.tools.export.folder import DatasetExportError, export_folder
from framestream.tools.export.formats import COLUMNS, FORMATS, NotExpressibleError, TrainerFormat
from framestream.tools.export.media_files import MediaExport

SPLITS = ("train", "val")
LEFT_OUT = "left_out.jsonl"  #: dialogues that are in no annotation file, with reasons
LAYOUT = "1"  #: of an export's folder; a folder of another layout is another export


@dataclass(slots=True)
class ExportCounts:
    """What an export wrote."""

    dialogues: dict[str, int] = field(default_factory=dict)  #: by split, without empty splits
    media: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  #: dialogues by reason
    damaged: int = 0  #: media that could not be read


@dataclass(slots=True)
class _SplitPlan:
    """What the annotation file of one split has."""

    count: int = 0
    first: dict[str, int] = field(default_factory=dict)  #: kind of media -> number of the first dialogue that has some


class _Converted(NamedTuple):
    """One dialogue in the form of the trainer, or why it is left out."""

    split: str
    media: list[int]  #: rows of the media table
    row: dict[str, Any] | None
    reason: str
    why: dict[str, str]  #: line of :data:`LEFT_OUT`


def export_root(root: str | os.PathLike[str], format_name: str, folder: Path, workers: int = 8) -> ExportCounts:
    """Write the dialogues of a root, and the media that they name, for a trainer that reads files.

    A repeated call goes on where the earlier one was stopped. The annotation files are written last.

    Args:
        root: folder or address of a finished build.
        format_name: one of :data:`framestream.tools.export.formats.FORMATS`.
        folder: to write to; missing, empty, or an earlier try of the same export.
        workers: threads that read and write media.

    Raises:
        ShardsError: the root is not a finished build.
        DatasetExportError: the folder cannot be used, there is no dialogue, or none can be said in the format.
        LockError, RecordError: as for :func:`framestream.tools.export.folder.export_folder`.
        OSError: the shards cannot be reached, or a file cannot be written.
    """
    index = Index.open(root)
    index.check_shard_files()
    if not index.storage.remote and folder.resolve().is_relative_to(Path(index.root).resolve()):
        raise DatasetExportError(f"{folder}: is in the root; choose a folder outside of it")
    export = _Export(index, FORMATS[format_name], folder)
    export.plan({})
    if not export.plans:
        if not len(index.dialogues):
            raise DatasetExportError(f"{index.root}: has no dialogues to export")
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in export.counts.left_out.items())
        fault = f"none of its {len(index.dialogues):,} dialogues can be said in the format {format_name} ({reasons})"
        raise DatasetExportError(f"{index.root}: {fault}; choose another format")
    with export_folder(folder, {"format": format_name, "index": index.fingerprint, "layout": LAYOUT}):
        failures = export.media.write(sorted(export.used), workers)
        if failures:
            export.plan(failures)
        export.write(failures)
    export.counts.damaged = len(failures)
    return export.counts


class _Export:
    """One export: which dialogues it has, and its annotation files."""

    def __init__(self, index: Index, form: TrainerFormat, folder: Path) -> None:
        self._index, self._form, self._folder = index, form, folder
        self.media = MediaExport(index, folder)
        self.plans: dict[str, _SplitPlan] = {}
        self.used: set[int] = set()  #: rows of the media table
        self.counts = ExportCounts()

    def plan(self, failures: Mapping[int, str]) -> None:
        """Find out which dialogues and media the export has without the media of ``failures``."""
        plans: dict[str, _SplitPlan] = {}
        self.used, self.counts = set(), ExportCounts()
        for number, found in enumerate(self._convert(failures, "check")):
            if found.row is None:
                self.counts.left_out[found.reason] += 1
                continue
            plan = plans.setdefault(found.split, _SplitPlan())
            plan.count += 1
            self.used.update(found.media)
            for kind, column in COLUMNS.items():
                if column in found.row or kind in found.row:
                    plan.first.setdefault(kind, number)
        self.plans = {split: plans[split] for split in SPLITS if split in plans}
        for plan in plans.values():
            plan.first = {kind: plan.first[kind] for kind in COLUMNS if kind in plan.first}
        self.counts.dialogues = {split: plan.count for split, plan in self.plans.items()}
        self.counts.media = len(self.used)

    def write(self, failures: Mapping[int, str]) -> None:
        """Write the annotation files, each completely or not at all."""
        with contextlib.ExitStack() as stack:
            left_out = stack.enter_context(atomic_file(self._folder / LEFT_OUT))
            files: dict[str, _AnnotationFile] = {}
            leading: set[int] = set()
            for split, plan in self.plans.items():
                file = stack.enter_context(atomic_file(self._folder / f"{split}.{self._form.extension}"))
                columns = [COLUMNS[kind] for kind in plan.first] if self._form.columns else []
                files[split] = _AnnotationFile(file, self._form.extension == "json", columns)
                leading.update(plan.first.values() if columns else ())
            # readers take the types of columns from the first rows: an image and a video come first
            for found in self._convert(failures, "annotations", sorted(leading)):
                assert found.row is not None
                files[found.split].add(found.row)
            for number, found in enumerate(self._convert(failures, "annotations")):
                if found.row is None:
                    left_out.write(_encode(found.why) + b"\n")
                elif number not in leading:
                    files[found.split].add(found.row)
            for annotations in files.values():
                annotations.finish()
        if self._form.dataset_info:
            described = self._form.describe_files({split: list(plan.first) for split, plan in self.plans.items()})
            write_atomic(self._folder / "dataset_info.json", (json.dumps(described, indent=2) + "\n").encode())

    def _convert(
        self, failures: Mapping[int, str], title: str, chosen: Sequence[int] | None = None
    ) -> Iterator[_Converted]:
        """Yield dialogues in the order of the index.

        Args:
            failures: damaged media; dialogues about them are left out.
            title: of the progress bar.
            chosen: numbers of dialogues, ascending; None for all.

        Raises:
            ShardsError: the index is not in the format.
        """
        table = self._index.dialogues
        if chosen is not None:
            table = table.take(pa.array(chosen, pa.int64()))
        with tqdm(total=len(table), unit=" dialogues", desc=title, disable=None, leave=False) as bar:
            for batch in table.to_batches():
                for item in batch.to_pylist():
                    yield self._convert_one(item, failures)
                bar.update(len(batch))

    def _convert_one(self, item: Mapping[str, Any], failures: Mapping[int, str]) -> _Converted:
        split, media = item["split"], item["media"]
        if split not in SPLITS or not all(0 <= row < len(self._index.media) for row in media):
            fault = f"{item['key']:.40} has a split or media that do not exist; build it again"
            raise ShardsError(f"{self._index.root}: dialogues.arrow: {fault}")
        try:
            for row in media:
                if row in failures:
                    raise NotExpressibleError("damaged", failures[row])
            files = [self.media.path(row) for row in media]
            return _Converted(split, media, self._form.convert(item["key"], item["conversations"], files), "", {})
        except NotExpressibleError as error:
            why = {name: item[name] for name in ("key", "id", "entry", "split")}
            why |= {"reason": error.reason, "message": str(error)}
            return _Converted(split, media, None, error.reason, why)


class _AnnotationFile:
    """Rows of one annotation file, as one JSON list or as JSON lines, each with the same ``columns`` of media."""

    def __init__(self, file: BinaryIO, as_list: bool, columns: Sequence[str]) -> None:
        self._file, self._as_list, self._columns = file, as_list, columns
        self._before = b"[\n" if as_list else b""

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        self._file.write(self._before + _encode({**row, **{name: row.get(name, []) for name in self._columns}}))
        self._before = b",\n" if self._as_list else b"\n"

    def finish(self) -> None:
        """Write the end, after at least one row."""
        self._file.write(b"\n]\n" if self._as_list else b"\n")


def _encode(value: Mapping[str, Any]) -> bytes:
    """Return a JSON object on one line of ASCII, which every reader opens in the same way."""
    return json.dumps(value, allow_nan=False).encode()
