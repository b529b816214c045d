"""Samples in batches, dealt out to ranks and DataLoader workers, that go on exactly where they stopped.

The epochs of a data set stand one after the other, each a permutation of its samples by (seed, epoch). A step takes
the next ``batch_size`` x ``world_size`` of them, ``batch_size`` for each rank; worker w of K makes the steps w, w + K,
... of its rank, which a DataLoader puts back in order. So neither the number of workers nor what was prefetched has a
part in the order, all ranks have equally many steps, and the state is the number of samples that all ranks were given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from framestream.pipeline.adapters.dataset import ShardDataset
from framestream.pipeline.adapters.types import Sample, SampleError
from framestream.pipeline.loading.loader import StateError, UnreadableError
from framestream.pipeline.planning.mixing import epoch_seed, permute


class StreamBatch(NamedTuple):
    """What one rank is given in one step."""

    samples: list[Sample]
    skipped: list[tuple[str, str]]  #: (key, reason) of samples that could not be read
    state: dict[str, Any]  #: where to go on after this batch, the same on all ranks


class ShardStream(IterableDataset[StreamBatch]):
    """Batches of a :class:`ShardDataset`; give it to ``DataLoader(stream, batch_size=None, num_workers=...)``.

    A pass goes from the loaded state, else from the start, to the end of the last epoch. The last step is filled up
    with the samples that an epoch more would begin with. Another pass begins where this one did.

    Args:
        dataset: what is dealt out.
        batch_size: samples that a rank is given in a step.
        rank: which of the ranks this is.
        world_size: how many ranks there are; it may differ after a resume.
        seed: of the order.
        epochs: how often each sample is given.
        shuffle: false: the order of the index in every epoch.
        max_unreadable: how many samples a process may skip in a pass before it stops.
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
        """Steps of a pass, equal on all ranks."""
        left = self.epochs * len(self.dataset) - self._position
        return max(0, -(-left // (self.batch_size * self.world_size)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin after the batch that ``state`` came with, whatever its batch size and number of ranks.

        Raises:
            StateError: it belongs to another root or to settings that make another order.
        """
        here = self._state(0)
        differ = sorted(name for name in here if name != "position" and state.get(name) != here[name])
        if differ:
            what = ", ".join(f"{name} ({state.get(name)} there, {here[name]} here)" for name in differ)
            raise StateError(f"the stream's state is of other data or settings: {what}; use those, or start anew")
        self._position = int(state["position"])

    def __iter__(self) -> Iterator[StreamBatch]:
        """The batches of this rank, or of this worker's share of them.

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
            for place in range(first + self.rank * self.batch_size, first + (self.rank + 1) * self.batch_size):
                if place // len(self.dataset) != epoch:
                    epoch = place // len(self.dataset)
                    order = self._order(epoch)
                number = int(order[place % len(self.dataset)])
                try:
                    samples.append(self.dataset[number])
                except SampleError as error:
                    skipped.append((self.dataset.key(number), str(error)))
                    unreadable += 1
                    if unreadable > self.max_unreadable:
                        raise UnreadableError(
                            f"{unreadable} samples could not be read, more than max_unreadable "
                            f"({self.max_unreadable}); check the shards with this: {error}"
                        ) from None
            yield StreamBatch(samples, skipped, self._state(first + step_size))

    def _order(self, epoch: int) -> np.ndarray:
        numbers = np.arange(len(self.dataset))
        return permute(numbers, epoch_seed(self.seed, epoch)) if self.shuffle else numbers

    def _state(self, position: int) -> dict[str, Any]:
        data = {"index": self.dataset.index.fingerprint, "by": self.dataset.by, "split": self.dataset.split}
        return {"position": position, "seed": self.seed, "shuffle": self.shuffle, **data}
