"""A plain PyTorch data set over a shard root: random access by dialogue or by medium."""

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


class ShardDataset(Dataset[Sample]):
    """The samples of one split, numbered in the order of the index.

    It is cheap to send to worker processes, whether they fork or are spawned: each opens the index for itself.

    Args:
        root: folder of a finished build, such as shards/stage3.
        by: ``dialogue``: one dialogue with its media, in order of use. ``media``: one medium with the dialogues of
            the split that are about it alone.
        frames: how many frames of each video, from 1 to any number; ``Frames(...)`` for another sampler or size; None
            for each stored frame once. Where a frame is not stored, the nearest one is shown with its own second.
        split: ``train`` or ``val``.

    Raises:
        ShardsError: no finished shards there, nothing in the split, or other frames than those of the build asked of
            a root that was built with ``compat: published``.
    """

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
            raise ShardsError(f"{self.root}: was built with compat: published, which stores what is shown; frames=None")
        self._pixels = FrameReader(index)
        self._columns = {name: index.dialogues[name] for name in index.dialogues.column_names}
        self._rows = _rows(index.media if self.by == "media" else index.dialogues, self.split)
        if not len(self._rows):
            raise ShardsError(f"{self.root}: no {self.by} of split {self.split}; give another split, or build one")
        if self.by == "media":
            self._about = _about(index, self.split)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("root", "by", "frames", "split")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, number: int) -> str:
        """Key of the dialogue or medium that sample ``number`` is about."""
        table = self.index.media if self.by == "media" else self.index.dialogues
        return table["key"][self._row(number)].as_py()

    def __getitem__(self, number: int) -> Sample:
        """Sample ``number``, its frames decoded.

        Raises:
            SampleError: a shard or one of its frames cannot be read.
        """
        row = self._row(number)
        if self.by == "dialogue":
            media = self._columns["media"][row].as_py()
            return Sample([self._medium(medium) for medium in media], [self._dialogue(row)])
        first, last = np.searchsorted(self._about[0], (row, row + 1))
        return Sample([self._medium(row)], [self._dialogue(about) for about in self._about[1][first:last].tolist()])

    def _row(self, number: int) -> int:
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return int(self._rows[number])

    def _dialogue(self, row: int) -> Dialogue:
        key, id_, entry, turns = (self._columns[name][row].as_py() for name in ("key", "id", "entry", "conversations"))
        return Dialogue(json.loads(turns), key, id_, entry)

    def _medium(self, row: int) -> Media:
        try:
            frames, timestamps = self._still(row) if self._value("kind", row) == "image" else self._video(row)
        except (OSError, ValueError) as error:
            raise SampleError(f"{self._pixels.describe(row)}: {' '.join(str(error).split())}") from None
        facts = {name: self._value(name, row) for name in ("key", "kind", "start", "duration", "source")}
        return Media(torch.from_numpy(frames), torch.from_numpy(timestamps), **facts)

    def _still(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return self._pixels.read_image(row)[None], np.zeros(1)

    def _video(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        vlen, fps, duration, key = (self._value(name, row) for name in ("vlen", "fps", "duration", "key"))
        stored, seconds = (row_values(self.index.media[name], row) for name in ("frame_index", "timestamps"))
        seed = media_seed(self.index.specification.get("seed", 0), key)
        places = choose_stored_frames(self.frames, stored, vlen, fps, duration, seed)
        width, height = shown_size(self.frames, self._value("width", row), self._value("height", row))
        frames = np.empty((len(places), height, width, 3), dtype=np.uint8)
        self._pixels.read_frames(row, places.tolist(), frames)
        return frames, seconds[places]

    def _value(self, name: str, row: int) -> Any:
        return self._pixels.column_value(name, row)


def _rows(table: pa.Table, split: str) -> np.ndarray:
    """Rows of a split, ascending, int64."""
    return np.flatnonzero(pc.equal(table["split"], split).to_numpy())


def _about(index: Index, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of media, ascending, and of the split's dialogues about each of them alone; int64, side by side."""
    media, rows = index.dialogues["media"], _rows(index.dialogues, split)
    alone = rows[pc.list_value_length(media).to_numpy()[rows] == 1]
    only = pc.list_flatten(media.take(pa.array(alone))).to_numpy().astype(np.int64)
    order = np.argsort(only, kind="stable")
    return only[order], alone[order]
