"""Batches of samples, distributed over ranks and DataLoader workers, with exact resume.

The epochs of a dataset follow each other, each a permutation of its samples by (seed, epoch). A step consumes the next
``batch_size`` x ``world_size`` samples, ``batch_size`` for each rank. Worker w of K makes steps w, w + K, ... of its
rank, and the DataLoader restores their order. So the order does not depend on the number of workers or on prefetching,
all ranks have the same number of steps, and the state is the number of samples that all ranks together have received.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from framestream.pipeline.adapters.dataset import ShardDataset
from framestream.pipeline.adapters.types import Sample, SampleError
from framestream.pipeline.loading.loader import UnreadableError, validate_state
from framestream.pipeline.planning.mixing import epoch_seed, permute


class StreamBatch(NamedTuple):
    """The samples of one rank in one step."""

    samples: list[Sample]
    skipped: list[tuple[str, str]]  #: (key, reason) of samples that could not be read
    state: dict[str, Any]  #: position after this batch, the same on all ranks; see :meth:`ShardStream.load_state_dict`


class ShardStream(IterableDataset[StreamBatch]):
    """Batches of a :class:`ShardDataset`, for ``DataLoader(stream, batch_size=None, num_workers=...)``.

    A pass runs from the loaded state, or from the start, to the end of the last epoch. The last step is filled up with
    the first samples of a further epoch. The next pass begins at the same position as this one.

    Args:
        dataset: source of the samples.
        batch_size: samples of one rank in one step.
        rank: number of this rank.
        world_size: number of ranks; it may change on resume.
        seed: of the order.
        epochs: number of times that each sample is returned.
        shuffle: False for the order of the index in every epoch.
        max_unreadable: samples that a process may skip in a pass before it stops.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
        max_unreadable: int = 0,
    ) -> None:
        if batch_size < 1 or epochs < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size}, epochs {epochs}, rank {rank} of {world_size}: out of range")
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.seed, self.epochs, self.shuffle, self.max_unreadable = seed, epochs, shuffle, max_unreadable
        self._position = 0

    def __len__(self) -> int:
        """Number of steps in a pass, equal on all ranks."""
        remaining = self.epochs * len(self.dataset) - self._position
        return max(0, -(-remaining // (self.batch_size * self.world_size)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position after the batch that has ``state``. Batch size and number of ranks may change.

        Raises:
            StateError: the state was created with another root, or with settings that make another order.
        """
        validate_state("stream", {name: state.get(name) for name in self._order_settings()}, self._order_settings())
        self._position = int(state["position"])

    def __iter__(self) -> Iterator[StreamBatch]:
        """Yield the batches of this rank, or in a DataLoader worker its share of them.

        Raises:
            UnreadableError: more than ``max_unreadable`` samples could not be read.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        unreadable, step_size = 0, self.batch_size * self.world_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(worker, len(self), workers):
            first = self._position + step * step_size
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
            yield StreamBatch(samples, skipped, self._state(first + step_size))

    def _order(self, epoch: int) -> np.ndarray:
        numbers = np.arange(len(self.dataset))
        return permute(numbers, epoch_seed(self.seed, epoch)) if self.shuffle else numbers

    def _order_settings(self) -> dict[str, Any]:
        data = {"index": self.dataset.index.fingerprint, "by": self.dataset.by, "split": self.dataset.split}
        return {"seed": self.seed, "shuffle": self.shuffle, **data}

    def _state(self, position: int) -> dict[str, Any]:
        return {"position": position, **self._order_settings()}
