"""Which pass over a stream runs: the number that a process and the workers of its DataLoader agree on.

A DataLoader gives every worker a copy of the stream, and begins a pass in each of them at about the same time. With
persistent workers the copies stay, otherwise every pass has new ones. So passes are counted in memory that all copies
share. The workers of one DataLoader have a common base seed, which tells the passes of two DataLoaders apart.
"""

from __future__ import annotations

import multiprocessing
import os

import torch
from torch.utils.data import get_worker_info

ROWS = 1024  #: workers whose passes are counted; a worker with a higher number uses the row of a lower one
KEY_BITS = 39
PASS_BITS = 24


class PassCounter:
    """Ranges of positions of successive passes.

    The first pass goes from ``first`` to ``end``, and each later one over the next ``length`` positions.

    Args:
        length: positions of a complete pass.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._begun: dict[int, int] = {}  # passes that this copy began, by number of the worker
        self._cells = torch.zeros(2 + ROWS, dtype=torch.int64).share_memory_()
        self._process = os.getpid()
        self.restart(0, length)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if not self._cells.is_shared():  # a copy for another program; those of DataLoader workers share the memory
            self._cells.share_memory_()
            self._process = os.getpid()

    def restart(self, first: int, end: int) -> None:
        """Let the next pass go from ``first`` to ``end``."""
        self._cells[2:] = 0
        self._cells[0], self._cells[1] = first, end

    def upcoming(self) -> tuple[int, int]:
        """Return the first and the last position + 1 of the next pass."""
        return self._range(self._last())

    def begin(self) -> tuple[int, int]:
        """Begin a pass in this process or worker, and return its first and its last position + 1.

        Raises:
            RuntimeError: the stream was created in another process than the one that reads it.
        """
        info = get_worker_info()
        parent = multiprocessing.parent_process()
        reader = parent.pid if info and parent else os.getpid()
        if reader != self._process:
            raise RuntimeError(
                f"the stream was created in process {self._process} and is read by process {reader}; "
                f"create it in the process that reads it, such as each rank"
            )
        if info is None:
            number, row, key = self._last(), 2, 0
        else:
            row = 2 + (1 + info.id) % ROWS
            self._begun[info.id] = self._begun.get(info.id, 0) + 1
            key = hash((info.seed - info.id, self._begun[info.id])) % (1 << KEY_BITS)
            number = self._number(row, key)
        self._cells[row] = key << PASS_BITS | number + 1
        return self._range(number)

    def _number(self, row: int, key: int) -> int:
        """Return the number of the pass with ``key``: that of another worker that has begun it, or the next one."""
        values = self._cells[2:].clone()
        passes = values & (1 << PASS_BITS) - 1
        own = int(passes[row - 2]) if int(values[row - 2]) >> PASS_BITS == key else 0  # a seed that was used before
        others = passes[(values >> PASS_BITS == key) & (passes > own)]
        return int(others.max() if len(others) else passes.max() + 1) - 1

    def _last(self) -> int:
        """Return the number of passes that have begun since the last restart."""
        return int((self._cells[2:] & (1 << PASS_BITS) - 1).max())

    def _range(self, number: int) -> tuple[int, int]:
        first, end = self._cells[:2].tolist()
        if number:
            first, end = end + (number - 1) * self._length, end + number * self._length
        return first, end
