"""Whole shards in order through webdataset, every dialogue with its media.

    for sample in stream_members("hf://datasets/OWNER/NAME/stage3", frames=8):

The other readers of this package fetch the frames that are shown, by byte offset. This one reads shards from end to
end, which suits disks and lines that are fast only at that. It is a ``webdataset.DataPipeline``, so webdataset's own
stages and loaders go on from there.

The samples of all video and image shards, in an order of shards by (seed, epoch), are one long line. Every worker of
every rank reads an equal part of the line, so there may be fewer shards than workers. A worker has a few shards open
and takes from them at random. Some dialogues come from the index, with their media by byte offset: those without media,
with several, or about a media item in a shard of another split. They are spread evenly among the others. A buffer of
compressed samples shuffles once more.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset import DataPipeline, reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander
from webdataset.utils import pytorch_worker_info

from framestream.pipeline.adapters.dataset import ShardDataset
from framestream.pipeline.adapters.frame_selection import FrameChoice
from framestream.pipeline.adapters.passes import PassCounter
from framestream.pipeline.adapters.sample_members import read_media
from framestream.pipeline.adapters.types import Sample, SampleError
from framestream.pipeline.planning.mixing import epoch_seed, permute
from framestream.pipeline.shards.writer import BLOCK
from framestream.pipeline.utils.arguments import refuse_unknown_arguments

OPEN_SHARDS = 4  #: shards from which a worker takes samples at random

Handler = Callable[[Exception], bool]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive media items of one shard that one worker reads."""

    shard: int  #: row of the shard table
    first: int  #: row of the media table
    stop: int  #: row after the last one


@dataclass(frozen=True, slots=True)
class _Compressed:
    """A sample whose frames are not decoded yet."""

    media: tuple[int, ...]  #: rows of the media table
    dialogues: tuple[int, ...]  #: rows of the dialogue table
    members: Mapping[str, Any] | None = None  #: of the only media item; None if media are read by byte offset
    size: int = 0  #: bytes, to bound the shuffle buffer


@refuse_unknown_arguments
def stream_members(
    root: str | os.PathLike,
    frames: FrameChoice = None,
    *,
    by: str = "dialogue",
    split: str = "train",
    shuffle_mb: int = 256,
    seed: int = 0,
    handler: Handler = reraise_exception,
) -> DataPipeline:
    """Return a ``webdataset.DataPipeline`` of :class:`framestream.pipeline.adapters.Sample`.

    Every pass over it is another epoch: each sample once, divided among the workers of a DataLoader and among ranks
    (those of torch.distributed, or RANK and WORLD_SIZE). It has no position within an epoch, and writes nothing:
    ``.stage(0).set_epoch(epoch)`` begins an epoch again after a kill. Ranks may get numbers of samples that differ by
    some, so trainers that wait for each other use ``.with_epoch(samples)``, or a :class:`ShardStream`, whose ranks are
    equal.

    Args:
        root: folder or address of a finished build.
        frames: as for :class:`framestream.pipeline.adapters.ShardDataset`.
        by: ``dialogue`` for samples of one dialogue with all its media. ``media`` for samples of one media item with
            the dialogues about it alone, so that it is read and encoded once; others are left out.
        split: ``train``, or ``val`` for the dialogues that are held out.
        shuffle_mb: megabytes of compressed samples in the shuffle buffer of each worker; 0 for samples in the order of
            the index.
        seed: of the order.
        handler: what to do about a sample, or the rest of a shard, that cannot be read. As in webdataset's own stages,
            it raises, or returns True to go on without it, or False to end the pass after the samples that were read:
            ``webdataset.reraise_exception``, ``warn_and_continue``, ``warn_and_stop``, ...

    Raises:
        ShardsError: as for :class:`framestream.pipeline.adapters.ShardDataset`.
        ValueError: an invalid argument.
    """
    if shuffle_mb < 0:
        raise ValueError(f"shuffle_mb: {shuffle_mb} is negative; use 0 for the order of the index")
    dataset = ShardDataset(root, by=by, frames=frames, split=split)
    source = MemberSource(dataset, shuffle_mb > 0, seed, handler)
    shuffle = [_Shuffle(source, shuffle_mb * 10**6)] if shuffle_mb else []
    return DataPipeline(source, *shuffle, _Decode(dataset, handler))


class MemberSource:
    """The first stage: compressed samples of one worker, in the order in which they are read."""

    def __init__(self, dataset: ShardDataset, shuffle: bool, seed: int, handler: Handler) -> None:
        self._dataset, self._shuffled, self._seed, self._handler = dataset, shuffle, seed, handler
        self._passes = PassCounter(1)
        self.epoch = -1  #: of the pass that runs in this process

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be ``epoch``."""
        self._passes.restart(epoch, epoch + 1)

    def random(self, purpose: int) -> np.random.Generator:
        """Return a generator for this epoch, worker and purpose."""
        rank, _, worker, _ = pytorch_worker_info()
        return np.random.default_rng((self._seed, self.epoch, rank, worker, purpose))

    def __call__(self) -> Iterator[_Compressed]:
        self.epoch, _ = self._passes.begin()
        rank, ranks, worker, workers = pytorch_worker_info()
        number, count = rank * workers + worker, ranks * workers
        plan = _Plan(self._dataset)
        shards, offset = plan.shards, plan.by_offset
        if self._shuffled:
            shards = permute(shards, epoch_seed(self._seed, self.epoch))
            offset = permute(offset, epoch_seed(self._seed, self.epoch))
        segments = plan.segments(shards, number, count)
        return self._mixed(plan, segments, offset[number::count].tolist())

    def _mixed(self, plan: _Plan, segments: list[_Segment], offset: list[int]) -> Iterator[_Compressed]:
        """Take samples from a few open shards, and dialogues by offset in proportion to what is left of both."""
        rng, waiting = self.random(0), iter(segments)
        left = [plan.count_samples(segments), len(offset)]
        by_offset = iter(offset)
        opened: list[Iterator[_Compressed]] = []
        while sum(left):
            while len(opened) < (OPEN_SHARDS if self._shuffled else 1):
                segment = next(waiting, None)
                if segment is None:
                    break
                opened.append(self._read(plan, segment))
            if left[1] and (not opened or (self._shuffled and rng.random() * sum(left) >= left[0])):
                left[1] -= 1
                yield plan.compressed_by_offset(next(by_offset))
                continue
            if not opened:  # a shard that could not be read had more samples
                left[0] = 0
                continue
            number = int(rng.integers(len(opened)))
            try:
                sample = next(opened[number], None)
            except _Stopped:
                return
            if sample is None:
                del opened[number]
                continue
            left[0] -= 1
            yield sample

    def _read(self, plan: _Plan, segment: _Segment) -> Iterator[_Compressed]:
        """Yield the samples of a segment, read from its first to its last byte."""
        index = self._dataset.index
        url = str(index.shard_path(segment.shard))
        offset, size = plan.byte_range(segment)
        stream = _Stream(index.storage.read_in_order(index.shard(segment.shard), offset, size))
        row = segment.first
        try:
            for members in group_by_keys(tar_file_expander([{"url": url, "stream": stream}], eof_value=None)):
                key = plan.keys[row].as_py() if row < segment.stop else "nothing"
                if members["__key__"] != key:
                    raise SampleError(f"{url}: has {members['__key__']} in place of {key}; restore the shard")
                yield from plan.compressed(row, members)
                row += 1
            if row < segment.stop:
                raise SampleError(f"{url}: ends before {plan.keys[row].as_py()}; restore the shard")
        except Exception as error:
            if not self._handler(
                error if isinstance(error, SampleError) else SampleError(f"{url}: {_one_line(error)}")
            ):
                raise _Stopped from None


class _Stopped(Exception):
    """The handler of a shard that cannot be read ends the pass."""


class _Plan:
    """Which dialogues come with which media item, and where the samples of each shard are."""

    def __init__(self, dataset: ShardDataset) -> None:
        self._by, index = dataset.by, dataset.index
        self._media_rows, self._dialogue_rows = dataset.pairs
        self._shard_of = index.media["shard"].to_numpy()
        self._offsets, self._shards = index.media["offset"], index.shards
        self.keys = index.media["key"]
        of_split = np.array([name == dataset.split for name in index.shards["split"].to_pylist()], dtype=bool)
        with_media = np.array([name != "dialogue" for name in index.shards["folder"].to_pylist()], dtype=bool)
        #: rows of the shard table that are read in order, int64 (n,)
        self.shards = np.flatnonzero(of_split & with_media)
        in_order = of_split[self._shard_of[self._media_rows]]
        self._media_rows, self._dialogue_rows = self._media_rows[in_order], self._dialogue_rows[in_order]
        #: rows of the dialogue table whose media are read by byte offset, int64 (n,)
        self.by_offset = np.empty(0, dtype=np.int64)
        if self._by == "dialogue":
            self.by_offset = np.setdiff1d(dataset.dialogue_rows, self._dialogue_rows)
        self._media = index.dialogues["media"]

    def segments(self, shards: np.ndarray, number: int, count: int) -> list[_Segment]:
        """Return the part of worker ``number`` of ``count`` of the samples of ``shards``, one after another."""
        rows = [np.searchsorted(self._shard_of, (shard, shard + 1)) for shard in shards.tolist()]
        total = sum(int(stop - first) for first, stop in rows)
        begin, end = total * number // count, total * (number + 1) // count
        segments, position = [], 0
        for shard, (first, stop) in zip(shards.tolist(), rows, strict=True):
            low, high = max(begin - position, 0), min(end - position, int(stop - first))
            if low < high:
                segments.append(_Segment(shard, int(first) + low, int(first) + high))
            position += int(stop - first)
        return segments

    def count_samples(self, segments: Iterable[_Segment]) -> int:
        """Count the samples that the segments have."""
        if self._by == "media":
            return sum(segment.stop - segment.first for segment in segments)
        bounds = [np.searchsorted(self._media_rows, (segment.first, segment.stop)) for segment in segments]
        return sum(int(stop - first) for first, stop in bounds)

    def byte_range(self, segment: _Segment) -> tuple[int, int]:
        """Return offset and size of a segment in its shard, from a tar header to a tar header or to the end."""
        begin = self._offsets[segment.first].as_py() - BLOCK
        end = self._shards["bytes"][segment.shard].as_py()
        if segment.stop < len(self._shard_of) and self._shard_of[segment.stop] == segment.shard:
            end = self._offsets[segment.stop].as_py() - BLOCK
        return begin, end - begin

    def compressed(self, row: int, members: Mapping[str, Any]) -> Iterator[_Compressed]:
        """Yield the samples of a media item."""
        first, stop = np.searchsorted(self._media_rows, (row, row + 1))
        dialogues = self._dialogue_rows[first:stop].tolist()
        size = sum(len(data) for data in members.values() if isinstance(data, bytes))
        if self._by == "media":
            yield _Compressed((row,), tuple(dialogues), members, size)
            return
        for dialogue in dialogues:
            yield _Compressed((row,), (dialogue,), members, size // len(dialogues))

    def compressed_by_offset(self, dialogue: int) -> _Compressed:
        """Return the sample of a dialogue whose media are read when it is decoded."""
        return _Compressed(tuple(self._media[dialogue].as_py()), (dialogue,))


@dataclass(frozen=True, slots=True)
class _Shuffle:
    """A stage that returns samples at random from a buffer of ``limit`` bytes."""

    source: MemberSource
    limit: int

    def __call__(self, samples: Iterable[_Compressed]) -> Iterator[_Compressed]:
        held: list[_Compressed] = []
        size, rng = 0, None
        for sample in samples:
            rng = rng or self.source.random(1)  # after the source has begun its epoch
            held.append(sample)
            size += sample.size
            while size > self.limit:
                number = int(rng.integers(len(held)))
                held[number], held[-1] = held[-1], held[number]
                size -= held[-1].size
                yield held.pop()
        if rng is not None:
            for number in rng.permutation(len(held)).tolist():
                yield held[number]


@dataclass(frozen=True, slots=True)
class _Decode:
    """The last stage: decodes the frames that are shown."""

    dataset: ShardDataset
    handler: Handler

    def __call__(self, samples: Iterable[_Compressed]) -> Iterator[Sample]:
        for sample in samples:
            try:
                yield self._decode(sample)
            except SampleError as error:
                if not self.handler(error):
                    return

    def _decode(self, sample: _Compressed) -> Sample:
        dialogues = [self.dataset.dialogue(row) for row in sample.dialogues]
        if sample.members is None:
            return Sample([self.dataset.media(row) for row in sample.media], dialogues)
        seed = self.dataset.index.specification.get("seed", 0)
        return Sample([read_media(sample.members, self.dataset.frames, seed)], dialogues)


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file that is read in order."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def read(self, size: int = -1) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end."""
        parts: list[memoryview] = []
        while size:
            self._rest = self._rest or memoryview(next(self._pieces, b""))
            if not self._rest:
                break
            parts.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(parts[-1])
        return b"".join(parts)


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
