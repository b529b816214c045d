"""A PyTorch dataset over a shard root: random access by dialogue or by media item."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from framestream.pipeline.adapters.frame_selection import FrameChoice, choose_stored_frames, shown_size, validate_choice
from framestream.pipeline.adapters.types import Dialogue, Media, Sample, SampleError
from framestream.pipeline.media.sampling import media_seed
from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import Index, ShardsError, row_values
from framestream.pipeline.utils.arguments import refuse_unknown_arguments


class ShardDataset(Dataset[Sample]):
    """The samples of one split, numbered in the order of the index.

    It is cheap to send to worker processes, forked or spawned: each opens the index for itself.

    Args:
        root: folder of a finished build, such as shards/stage3.
        by: ``dialogue`` for samples of one dialogue with its media, in order of use. ``media`` for samples of one media
            item with the dialogues of the split that are about it alone.
        frames: number of frames of each video, at least 1; ``FramesConfig(...)`` for another sampler or size; None for
            each stored frame once. If a frame is not stored, the nearest stored one is returned with its own timestamp.
        split: ``train`` or ``val``.

    Raises:
        ShardsError: there are no finished shards, the split is empty, or ``frames`` is not None for a root that was
            built with ``compat: published``.
        ValueError: an invalid argument.
    """

    @refuse_unknown_arguments
    def __init__(
        self, root: str | os.PathLike, *, by: str = "dialogue", frames: FrameChoice = None, split: str = "train"
    ) -> None:
        if by not in ("dialogue", "media"):
            raise ValueError(f"by: {by!r} is not dialogue or media")
        validate_choice(frames)
        self.root, self.by, self.frames, self.split = os.fspath(root), by, frames, split
        self._open()

    def _open(self) -> None:
        self.index = index = Index.open(self.root)
        if self.frames is not None and index.specification.get("compat", "none") == "published":
            raise ShardsError(
                f"{self.root}: was built with compat: published, which stores only the frames to show; use frames=None"
            )
        self._reader = FrameReader(index)
        self._columns = {name: index.dialogues[name] for name in index.dialogues.column_names}
        self._rows = _rows(index.media if self.by == "media" else index.dialogues, self.split)
        if not len(self._rows):
            raise ShardsError(f"{self.root}: no {self.by} of split {self.split}; use another split, or build one")
        self._pairs: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def dialogue_rows(self) -> np.ndarray:
        """Rows of the dialogue table of the split, int64 (n,), ascending."""
        return _rows(self.index.dialogues, self.split)

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of media, ascending, and of the split's dialogues that are about one media item alone, int64 (n,)."""
        if self._pairs is None:
            self._pairs = _dialogues_by_media(self.index, self.split)
        return self._pairs

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("root", "by", "frames", "split")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, number: int) -> str:
        """Return the key of the dialogue or media item of sample ``number``."""
        table = self.index.media if self.by == "media" else self.index.dialogues
        return table["key"][self._row(number)].as_py()

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number`` with its frames decoded.

        Raises:
            SampleError: a shard or one of its frames cannot be read.
            IndexError: there is no such sample.
        """
        row = self._row(number)
        if self.by == "dialogue":
            media = self._columns["media"][row].as_py()
            return Sample([self.media(media_row) for media_row in media], [self.dialogue(row)])
        media_rows, dialogue_rows = self.pairs
        first, last = np.searchsorted(media_rows, (row, row + 1))
        return Sample([self.media(row)], [self.dialogue(dialogue) for dialogue in dialogue_rows[first:last].tolist()])

    def _row(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return int(self._rows[number])

    def dialogue(self, row: int) -> Dialogue:
        """Return the dialogue in ``row`` of the dialogue table."""
        key, id_, entry, turns = (self._columns[name][row].as_py() for name in ("key", "id", "entry", "conversations"))
        return Dialogue(json.loads(turns), key, id_, entry)

    def media(self, row: int) -> Media:
        """Return the media item in ``row`` of the media table with its frames decoded.

        Raises:
            SampleError: its shard or one of its frames cannot be read.
        """
        try:
            frames, timestamps = self._image(row) if self._value("kind", row) == "image" else self._video(row)
        except (OSError, ValueError) as error:
            raise SampleError(f"{self._reader.describe(row)}: {' '.join(str(error).split())}") from None
        fields = {name: self._value(name, row) for name in ("key", "kind", "start", "duration", "source")}
        return Media(torch.from_numpy(frames), torch.from_numpy(timestamps), **fields)

    def _image(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self._reader.read_image(row)[None], np.zeros(1)

    def _video(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        vlen, fps, duration, key = (self._value(name, row) for name in ("vlen", "fps", "duration", "key"))
        stored, seconds = (row_values(self.index.media[name], row) for name in ("frame_index", "timestamps"))
        seed = media_seed(self.index.specification.get("seed", 0), key)
        indices = choose_stored_frames(self.frames, stored, vlen, fps, duration, seed)
        width, height = shown_size(self.frames, self._value("width", row), self._value("height", row))
        frames = np.empty((len(indices), height, width, 3), dtype=np.uint8)
        self._reader.read_frames(row, indices.tolist(), frames)
        return frames, seconds[indices]

    def _value(self, name: str, row: int) -> Any:
        return self._reader.column_value(name, row)


def _rows(table: pa.Table, split: str) -> np.ndarray:
    """Return the rows of a split, int64 (n,), ascending."""
    return np.flatnonzero(pc.equal(table["split"], split).to_numpy())


def _dialogues_by_media(index: Index, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pair the rows of media with those of the split's dialogues that are about one media item alone.

    Returns:
        Two int64 arrays (n,) of the same length: rows of the media table, ascending, and rows of the dialogue table.
    """
    media, rows = index.dialogues["media"], _rows(index.dialogues, split)
    alone = rows[pc.list_value_length(media).to_numpy()[rows] == 1]
    only = pc.list_flatten(media.take(pa.array(alone))).to_numpy().astype(np.int64)
    order = np.argsort(only, kind="stable")
    return only[order], alone[order]
