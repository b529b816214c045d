"""Batches for one rank: a plan that is pure arithmetic, and decoding ahead of it in threads or worker processes.

    loader = build_loader(manifest, rank, world_size)
    for batch in loader:            # one row of this rank; batch.last ends a global batch
        ...
    loader.state_dict()             # how many global batches were handed out, and what decides their order

The state is the number of global batches whose last row was handed out, whatever was decoded ahead of it, so that a run
continues with exactly the next one, in constant time, on any number of ranks that divides ``batching.row_multiple``.
It belongs to a checkpoint of the step that the last row completes. Rows are decoded in order, as many ahead as
``loader.prefetch_mb`` of pixels allow, by ``loader.threads`` in this process or in each of ``loader.workers``; how many
and how far ahead changes no batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.buffer_pool import BufferPool
from framestream.pipeline.loading.collate import MicroStep
from framestream.pipeline.loading.decode_processes import ProcessDecoder
from framestream.pipeline.loading.decode_threads import Decoder, LoaderError, ThreadDecoder
from framestream.pipeline.loading.pending_row import PendingRow
from framestream.pipeline.planning.dataset import open_dataset
from framestream.pipeline.planning.epoch_plan import EpochPlan
from framestream.pipeline.planning.summary import EpochSummary, summarize_epoch

__all__ = ["Loader", "LoaderError", "StateError", "UnreadableError", "build_loader"]

AHEAD = 64  #: rows that are decoded ahead, however small they are


class UnreadableError(LoaderError):
    """More dialogues could not be read than ``loader.max_unreadable``; one line that names files."""


class StateError(LoaderError):
    """A state that belongs to other data or settings; one line that names what differs."""


def build_loader(manifest: Manifest, rank: int = 0, world_size: int = 1, split: str = "train") -> Loader:
    """The loader of one rank over the roots of ``manifest.mix``, or ``manifest.shard_place``; tokenises each once.

    Raises:
        ShardsError: no finished shards are there, or none of their dialogues can be used.
        ManifestError: ``world_size`` does not divide ``batching.row_multiple``, the tokenizer cannot be loaded, or
            ``mix`` does not fit the shards.
    """
    multiple = manifest.batching.row_multiple
    if world_size < 1 or multiple % world_size:
        raise ManifestError(f"batching.row_multiple: {multiple} is not a multiple of {world_size} ranks; change either")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    corpus = open_dataset(manifest)
    for epoch in range(manifest.train.epochs):
        corpus.for_epoch(epoch)  # all caches are made here, where the first rank is alone
    return Loader(EpochPlan(corpus, manifest, split), rank, world_size)


class Loader:
    """Iterates over the rest of the current epoch, then stands at the start of the next one."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int) -> None:
        self._plan, self._corpus = plan, plan.dataset
        self._rank, self._world = rank, world_size
        self._epoch, self._step = 0, 0
        self._unreadable: list[str] = []
        loader = plan.manifest.loader
        self._pool = BufferPool(loader.prefetch_mb << 20, shared=loader.workers > 0)

    def __len__(self) -> int:
        """Global batches of an epoch, equal on all ranks."""
        return self._plan.batches

    def state_dict(self) -> dict:
        """``epoch``, ``step`` (global batches of it handed out whole) and ``fingerprint``; plain JSON values."""
        return {"epoch": self._epoch, "step": self._step, "fingerprint": self._plan.fingerprint()}

    def load_state_dict(self, state: dict) -> None:
        """Go to the place of ``state``; the next iteration starts with the global batch after it.

        Raises:
            StateError: the state belongs to another index or to other settings that decide order.
        """
        here, there = self._plan.fingerprint(), state["fingerprint"]
        differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if differ:
            what = ", ".join(f"{name} ({there.get(name)} there, {here.get(name)} here)" for name in differ)
            raise StateError(f"the loader's state is of other data or settings: {what}; use those, or start anew")
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def report(self) -> EpochSummary:
        """What the first epoch contains, by root and entry; reads nothing but lengths."""
        return summarize_epoch(self._plan)

    def excluded(self) -> Iterator[tuple[str, str]]:
        """(key, reason) of every dialogue that epochs would contain if it could be used."""
        for number in self._plan.excluded.tolist():
            yield self._corpus.key(number), self._corpus.skip_reason(number)

    def truncated(self) -> Iterator[tuple[str, str]]:
        """(key, reason) of every dialogue of epochs that loses its end to ``text.max_tokens``."""
        for number in self._plan.truncated.tolist():
            yield self._corpus.key(number), self._corpus.skip_reason(number)

    def __iter__(self) -> Iterator[Batch]:
        """Rows of this rank from the current place to the end of its epoch.

        Raises:
            UnreadableError: more than ``loader.max_unreadable`` dialogues of this rank could not be read; the row that
                says so has been given.
            WorkerError: a worker process died, failed or hangs.
        """
        epoch = self._epoch
        rows = self._rows(epoch, self._step)
        waiting: deque[PendingRow] = deque()
        pool, decoders = self._pool, self._decoders()
        try:
            upcoming = next(rows, None)
            while upcoming or waiting:
                while upcoming and len(waiting) < AHEAD and upcoming.start(decoders, pool, needed=not waiting):
                    waiting.append(upcoming)
                    upcoming = next(rows, None)
                row = waiting.popleft()
                batch = row.finish(decoders, pool)
                if batch.is_last:
                    ended = batch.step + 1 == len(self)
                    self._epoch, self._step = (epoch + 1, 0) if ended else (epoch, batch.step + 1)
                del row  # the consumer alone holds the pixels
                yield batch
                self._count(batch.skipped)  # after it was handed out, so that the consumer can note its reasons
                del batch
        finally:
            decoders.close()
            for row in waiting:
                row.abandon(pool)

    def _decoders(self) -> Decoder:
        manifest = self._plan.manifest
        if manifest.loader.workers:
            return ProcessDecoder(manifest, self._corpus.media_reader, self._pool)
        return ThreadDecoder(self._corpus.media_reader, manifest.loader.threads, manifest.loader.read_timeout)

    def _rows(self, epoch: int, first: int) -> Iterator[PendingRow]:
        """The rows of this rank, planned one global batch at a time."""
        for step in range(first, len(self)):
            planned = self._plan.global_batch(epoch, step)
            micros = len(planned.rows) // self._world
            for micro in range(micros):
                side_by_side = planned.rows[micro * self._world : (micro + 1) * self._world]
                groups = self._plan.num_tower_groups(side_by_side)
                place = MicroStep(epoch, step, micro, micros, planned.total_weight, groups)
                yield self._row(place, side_by_side[self._rank].tolist())

    def _row(self, place: MicroStep, dialogues: list[int]) -> PendingRow:
        frames, corpus = self._plan.manifest.frames, self._corpus.for_epoch(place.epoch)
        views = [corpus.views(number) for number in dialogues]
        clips = [sum(view.clips for view in shown) for shown in views]
        tiles = [sum(view.tiles for view in shown) for shown in views]
        return PendingRow(
            micro_step=place,
            keys=[corpus.key(number) for number in dialogues],
            texts=[corpus.text(number) for number in dialogues],
            weights=[self._plan.weight(number, place.epoch) for number in dialogues],
            views=views,
            clip_offsets=np.cumsum([0, *clips]),
            tile_offsets=np.cumsum([0, *tiles]),
            clip_shape=(frames.clip_frames, frames.size, frames.size, 3),
        )

    def _count(self, skipped: list[tuple[str, str]]) -> None:
        self._unreadable += [reason for _, reason in skipped]
        limit = self._plan.manifest.loader.max_unreadable
        if len(self._unreadable) > limit:
            named = "; ".join(dict.fromkeys(self._unreadable[-5:]))
            raise UnreadableError(
                f"{len(self._unreadable)} dialogues could not be read, more than loader.max_unreadable ({limit}); "
                f"check the shards with these: {named}"
            )
