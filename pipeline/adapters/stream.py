"""Batches of samples, distributed over ranks and DataLoader workers, with exact resume.

The epochs of a dataset follow each other, each a permutation of its samples by (seed, epoch). A step consumes the next
``batch_size`` x ``world_size`` samples, ``batch_size`` for each rank. Worker w of K makes steps w, w + K, ... of its
rank, and the DataLoader restores their order. So the order does not depend on the number of workers or on prefetching,
all ranks have the same number of steps, and the state is the number of samples that all ranks together have received.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from framestream.pipeline.adapters.dataset import ShardDataset
from framestream.pipeline.adapters.passes import PassCounter
from framestream.pipeline.adapters.types import SampleError, StreamBatch
from framestream.pipeline.loading.loader import StateError, UnreadableError, validate_state
from framestream.pipeline.planning.mixing import epoch_seed, permute
from framestream.pipeline.utils.arguments import refuse_unknown_arguments


class ShardStream(IterableDataset[StreamBatch]):
    """Batches of a :class:`ShardDataset`, for ``DataLoader(stream, batch_size=None, num_workers=...)``.

    The first pass has ``epochs`` epochs of samples, the next pass the epochs after these, and so on, with any number of
    workers, persistent or not. The last step of a pass is filled up with the first samples of a further epoch.
    :meth:`set_epoch` and :meth:`load_state_dict` decide where the next pass begins.

    The stream divides the samples among ranks itself. So its DataLoader must not be given to ``accelerator.prepare``.

    Args:
        dataset: source of the samples.
        batch_size: samples of one rank in one step.
        rank: number of this rank; None for that of torch.distributed, or 0 where it is not initialized.
        world_size: number of ranks; it may change on resume. None as for ``rank``.
        seed: of the order.
        epochs: number of times that each sample is returned in a pass.
        shuffle: False for the order of the index in every epoch.
        max_unreadable: samples that a process may skip in a pass before it stops.

    Raises:
        ValueError: a number is out of range.
    """

    @refuse_unknown_arguments
    def __init__(
        self,
        dataset: ShardDataset,
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
        max_unreadable: int = 0,
    ) -> None:
        grouped = distributed.is_available() and distributed.is_initialized()
        rank = rank if rank is not None else distributed.get_rank() if grouped else 0
        world_size = world_size if world_size is not None else distributed.get_world_size() if grouped else 1
        if batch_size < 1 or epochs < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, epochs {epochs}, rank {rank} of {world_size}: out of range")
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.seed, self.epochs, self.shuffle, self.max_unreadable = seed, epochs, shuffle, max_unreadable
        self._passes = PassCounter(epochs * len(dataset))
        self._loaded: tuple[int, int] | None = None  # range of the pass of the last loaded state

    def __len__(self) -> int:
        """Number of steps of the next pass, equal on all ranks."""
        return self._num_steps(*self._passes.upcoming())

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be number ``epoch``: it begins with epoch ``epoch * epochs``. Trainers call this.

        Raises:
            StateError: a state was loaded that is of another pass, and no pass has begun since.
            ValueError: ``epoch`` is not a number of at least 0, or accelerate has divided the stream among processes.
        """
        self._check_main()
        if type(epoch) is not int or epoch < 0:
            raise ValueError(f"set_epoch: {epoch!r} is not a whole number of at least 0")
        _refuse_dispatch(self)
        length = self.epochs * len(self.dataset)
        if self._loaded and self._passes.upcoming() == self._loaded:
            expected = (self._loaded[1] - 1) // length
            if expected != epoch:
                raise StateError(
                    f"set_epoch({epoch}) would discard the loaded state, which is in pass {expected}; "
                    f"let the trainer begin with {expected} (accelerate: loader.set_epoch({expected}))"
                )
            return
        self._passes.restart(epoch * length, (epoch + 1) * length)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position after the batch that has ``state``. Batch size and number of ranks may change.

        The next pass goes on from there, also in persistent workers. If the batch was the last of its pass, the next
        pass is the following one. A pass that runs is not moved.

        Raises:
            StateError: the state was created with another root, or with settings that make another order; or it is not
                a state of a stream.
        """
        self._check_main()
        validate_state("stream", {name: state.get(name) for name in self._order_settings()}, self._order_settings())
        length, position = self.epochs * len(self.dataset), state.get("position")
        end = state.get("end", 0)  # states of older versions have none
        if type(position) is not int or type(end) is not int or position < 0 or end < 0:
            raise StateError(f"position {position!r}, end {end!r}: not a state of a stream; pass `state` of a batch")
        end = -(-(end or max(position, 1)) // length) * length
        if position >= end:
            position, end = end, end + length
        self._passes.restart(position, end)
        self._loaded = position, end

    def __iter__(self) -> Iterator[StreamBatch]:
        """Yield the batches of this rank, or in a DataLoader worker its share of them.

        Raises:
            UnreadableError: more than ``max_unreadable`` samples could not be read.
            RuntimeError: the stream was created in another process than the one that reads it.
        """
        return self._batches(*self._passes.begin())

    def _batches(self, start: int, end: int) -> Iterator[StreamBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        unreadable, step_size = 0, self.batch_size * self.world_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(worker, self._num_steps(start, end), workers):
            first = start + step * step_size
            samples, skipped = [], []
            for position in range(first + self.rank * self.batch_size, first + (self.rank + 1) * self.batch_size):
                if position // len(self.dataset) != epoch:
                    epoch = position // len(self.dataset)
                    order = self._order(epoch)
                number = int(order[position % len(self.dataset)])
                try:
                    samples.append(self.dataset[number])
                except SampleError as error:
                    skipped.append((self.dataset.key(number), str(error)))
                    unreadable += 1
                    if unreadable > self.max_unreadable:
                        raise UnreadableError(
                            f"{unreadable} samples could not be read, more than max_unreadable "
                            f"({self.max_unreadable}); check this shard: {error}"
                        ) from None
            yield StreamBatch(samples, skipped, self._state(first + step_size, end))

    def _num_steps(self, start: int, end: int) -> int:
        return -(-(end - start) // (self.batch_size * self.world_size))

    def _order(self, epoch: int) -> np.ndarray:
        numbers = np.arange(len(self.dataset))
        return permute(numbers, epoch_seed(self.seed, epoch)) if self.shuffle else numbers

    def _order_settings(self) -> dict[str, Any]:
        data = {"index": self.dataset.index.fingerprint, "by": self.dataset.by, "split": self.dataset.split}
        return {"seed": self.seed, "shuffle": self.shuffle, **data}

    def _state(self, position: int, end: int) -> dict[str, Any]:
        return {"position": position, "end": end, **self._order_settings()}

    @staticmethod
    def _check_main() -> None:
        if get_worker_info() is not None:
            raise StateError("a position that is set in a DataLoader worker has no effect; set it in the main process")


def _refuse_dispatch(stream: ShardStream) -> None:
    """Raise if a loader of accelerate, which divides batches among processes once more, is about to read ``stream``."""
    state = sys.modules.get("accelerate.state")
    loader = state.GradientState().active_dataloader if state else None
    if loader is None or state.PartialState().num_processes == 1:  # type: ignore[union-attr]
        return
    dataset = getattr(loader, "dataset", None)
    if stream in (dataset, getattr(dataset, "dataset", None)):
        raise ValueError(
            "accelerate divides the batches of this DataLoader among processes, and ShardStream does so already; "
            "do not pass the DataLoader to accelerator.prepare, or use ShardDataset instead of ShardStream"
        )
