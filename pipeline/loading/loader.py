"""Batches for one rank: the order comes from a plan, and threads or worker processes decode ahead.

    loader = build_loader(manifest, rank, world_size)
    for batch in loader:            # len(loader) rows of this rank; batch.is_last ends a global batch
        ...
    loader.state_dict()             # the number of global batches returned, and what decides their order

The state is the number of global batches whose last row was returned, however far ahead rows were decoded. So a run
continues with exactly the next global batch, in constant time, on any number of ranks that divides
``batching.row_multiple``. The state belongs to a checkpoint of the step that the last row completes.

Rows are decoded in order, by ``loader.threads`` threads in this process or in each of ``loader.workers`` processes. The
pixels decoded ahead are bounded by ``loader.prefetch_mb``. None of these settings changes a batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.buffer_pool import BufferPool
from framestream.pipeline.loading.collate import MicroStep
from framestream.pipeline.loading.decode_processes import ProcessDecoder
from framestream.pipeline.loading.decode_threads import Decoder, LoaderError, ThreadDecoder
from framestream.pipeline.loading.pending_row import PendingRow
from framestream.pipeline.planning.dataset import ConcatDataset, open_dataset
from framestream.pipeline.planning.epoch_plan import EpochPlan
from framestream.pipeline.planning.summary import EpochSummary, summarize_epoch
from framestream.pipeline.utils.arguments import refuse_unknown_arguments
from framestream.pipeline.utils.differences import describe_changes

logger = logging.getLogger(__name__)

__all__ = ["Loader", "LoaderError", "StateError", "UnreadableError", "build_loader", "validate_state"]

MAX_PENDING_ROWS = 64  #: rows decoded ahead, even if they are small


class UnreadableError(LoaderError):
    """More dialogues than ``loader.max_unreadable`` could not be read; one line that names files."""


class StateError(LoaderError):
    """A state was created with different data or settings; one line that names the differences."""


@refuse_unknown_arguments
def build_loader(manifest: Manifest, rank: int = 0, world_size: int = 1, split: str = "train") -> Loader:
    """Build the loader of one rank over the roots of ``manifest.mix``, or over ``manifest.shard_root`` without a mix.

    The first call tokenizes each root and caches the token ids beside its index.

    Raises:
        ShardsError: there are no finished shards, or none of their dialogues can be used.
        ManifestError: ``world_size`` does not divide ``batching.row_multiple``, the tokenizer cannot be loaded, or
            ``mix`` does not fit the shards.
    """
    multiple = manifest.batching.row_multiple
    if world_size < 1 or multiple % world_size:
        raise ManifestError(f"batching.row_multiple: {multiple} is not a multiple of {world_size} ranks; change either")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    dataset = open_dataset(manifest)
    for epoch in range(manifest.train.epochs):
        dataset.for_epoch(epoch)  # makes all token caches now, while only the first rank is here
    return Loader(EpochPlan(dataset, manifest, split), rank, world_size)


def validate_state(owner: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a saved state was created with the current data and settings.

    Args:
        owner: whose state it is, for the message.
        saved: values of the state that decide the order.
        current: the same values now.

    Raises:
        StateError: one line that names up to three fields that differ.
    """
    if differences := describe_changes(saved, current, ("saved", "now")):
        raise StateError(
            f"Cannot resume: the saved {owner} state was created with different data or settings: {differences}. "
            f"Restore them, or start a new run."
        )


class Loader:
    """Batches of one rank. An iterator runs to the end of the current epoch; the next one starts the next epoch."""

    def __init__(self, plan: EpochPlan, rank: int, world_size: int) -> None:
        self._plan, self._dataset = plan, plan.dataset
        self._rank, self._world = rank, world_size
        self._epoch, self._step = 0, 0
        self._pass = 0, 0  #: epoch and first global batch of the pass that runs, or else of the next one
        self._unreadable: list[str] = []
        loader = plan.manifest.loader
        self._pool = BufferPool(loader.prefetch_mb << 20, shared=loader.workers > 0)

    def __len__(self) -> int:
        """Number of rows that the current pass gives this rank, or the next one if none runs; equal on all ranks.

        Epochs may differ in it. The first call for an epoch packs all of its global batches.
        """
        return self._plan.num_rows(*self._pass) // self._world

    @property
    def num_batches(self) -> int:
        """Number of global batches in an epoch, which are the optimizer steps of the trainer; equal on all ranks."""
        return self._plan.num_batches

    @property
    def dataset(self) -> ConcatDataset:
        """The dialogues of all splits of the roots, also of those that the loader does not read."""
        return self._dataset

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON values.

        Returns:
            ``epoch``, ``step`` (number of its global batches whose last row was returned) and ``fingerprint``.
        """
        return {"epoch": self._epoch, "step": self._step, "fingerprint": self._plan.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position saved in ``state``. The next iteration starts with the global batch after it.

        A pass that runs is not moved: it goes on, and the next one starts at ``state``.

        Raises:
            StateError: the state was created with another index, or with other settings that decide the order; or it is
                not a state of a loader.
        """
        epoch, step, fingerprint = (state.get(name) for name in ("epoch", "step", "fingerprint"))
        if not isinstance(fingerprint, Mapping):
            raise StateError("not the state of a loader; pass what state_dict() returned")
        validate_state("loader", fingerprint, self._plan.fingerprint())
        if type(epoch) is not int or type(step) is not int or epoch < 0 or not 0 <= step < self.num_batches:
            raise StateError(
                f"epoch {epoch}, step {step}: not a position of {self.num_batches} global batches an epoch"
            )
        self._epoch, self._step = self._pass = epoch, step

    def report(self) -> EpochSummary:
        """Summarize the first epoch by root and entry. It only reads lengths."""
        return summarize_epoch(self._plan)

    def excluded(self) -> Iterator[tuple[str, str]]:
        """Yield (key, reason) of every dialogue that is left out of epochs because it cannot be used."""
        for number in self._plan.excluded.tolist():
            yield self._dataset.key(number), self._dataset.skip_reason(number)

    def truncated(self) -> Iterator[tuple[str, str]]:
        """Yield (key, reason) of every dialogue of epochs whose end is cut off at ``text.max_tokens``."""
        for number in self._plan.truncated.tolist():
            yield self._dataset.key(number), self._dataset.skip_reason(number)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's rows, from the current position to the end of its epoch.

        Raises:
            UnreadableError: more than ``loader.max_unreadable`` dialogues of this rank could not be read. The row that
                lists the last of them was returned before.
            DecodeWorkerError: a worker process died, failed or hangs.
        """
        self._pass = epoch, _ = self._epoch, self._step
        rows = self._rows(epoch, self._step)
        pending: deque[PendingRow] = deque()
        pool, decoder = self._pool, self._make_decoder()
        try:
            upcoming = next(rows, None)
            while upcoming or pending:
                while upcoming and len(pending) < MAX_PENDING_ROWS and upcoming.start(decoder, pool, not pending):
                    pending.append(upcoming)
                    upcoming = next(rows, None)
                row = pending.popleft()
                batch = row.finish(decoder, pool)
                if batch.is_last:
                    ended = batch.step + 1 == self.num_batches
                    self._epoch, self._step = (epoch + 1, 0) if ended else (epoch, batch.step + 1)
                del row  # only the consumer may refer to the pixels, so that their buffer can be reused
                yield batch
                self._count(batch.skipped)  # after the batch was returned, so that the consumer can record the reasons
                del batch
        finally:
            self._pass = self._epoch, self._step
            decoder.close()
            for row in pending:
                row.abandon(pool)

    def _make_decoder(self) -> Decoder:
        manifest = self._plan.manifest
        if manifest.loader.workers:
            return ProcessDecoder(manifest, self._dataset.media_reader, self._pool)
        return ThreadDecoder(self._dataset.media_reader, manifest.loader.threads, manifest.loader.read_timeout)

    def _rows(self, epoch: int, first: int) -> Iterator[PendingRow]:
        """The rows of this rank, planned one global batch at a time."""
        for step in range(first, self.num_batches):
            planned = self._plan.global_batch(epoch, step)
            count = len(planned.rows) // self._world
            for index in range(count):
                rows = planned.rows[index * self._world : (index + 1) * self._world]  # one for each rank
                micro_step = MicroStep(epoch, step, index, count, planned.total_weight)
                yield self._row(micro_step, rows[self._rank].tolist())

    def _row(self, micro_step: MicroStep, dialogues: list[int]) -> PendingRow:
        frames, dataset = self._plan.manifest.frames, self._dataset.for_epoch(micro_step.epoch)
        views = [dataset.views(number) for number in dialogues]
        clips = [sum(view.clips for view in media) for media in views]
        tiles = [sum(view.tiles for view in media) for media in views]
        return PendingRow(
            micro_step=micro_step,
            keys=[dataset.key(number) for number in dialogues],
            texts=[dataset.ids_and_labels(number) for number in dialogues],
            weights=[self._plan.token_weight(number, micro_step.epoch) for number in dialogues],
            views=views,
            clip_offsets=np.cumsum([0, *clips]),
            tile_offsets=np.cumsum([0, *tiles]),
            clip_shape=(frames.clip_frames, frames.size, frames.size, 3),
        )

    def _count(self, skipped: list[tuple[str, str]]) -> None:
        for key, reason in skipped:
            logger.warning("%s: left out (%s)", key, reason)
            self._unreadable.append(reason)
        limit = self._plan.manifest.loader.max_unreadable
        if len(self._unreadable) > limit:
            reasons = "; ".join(dict.fromkeys(self._unreadable[-5:]))
            raise UnreadableError(
                f"{len(self._unreadable)} dialogues could not be read, more than loader.max_unreadable ({limit}); "
                f"check these shards: {reasons}"
            )
