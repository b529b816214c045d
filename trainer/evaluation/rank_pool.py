"""Share the questions of an evaluation among the processes of torchrun or srun, each with a GPU of its own.

Work is a list of units. A rank takes the next units when it has finished those before, many at first and one at a time
at the end, so that no rank waits long for a slower one. Units do not depend on the number of ranks. Ranks meet only in
the launcher's key-value store, and make no collective call while they work. A request to the store waits for a core
that computes, so there are few. The rank that fails first says why, and the others end without a word.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Store

from framestream.trainer.distributed.launchers import setup_environment
from framestream.trainer.distributed.run_store import POLL_SECONDS, open_store
from framestream.trainer.inference.device import select_device

SHARES = 8  #: of what is left, a rank takes one part in so many for each rank
JOIN_MINUTES = 30.0  #: until all ranks must have started; a rank is given up after half of it without a heartbeat
_NEXT, _DONE, _FAILED, _COLLECTED = "evaluation/next", "evaluation/done", "evaluation/failed", "evaluation/collected"


class RankFailedError(RuntimeError):
    """Another rank failed, and has said why."""


@dataclass
class RankPool:
    """The ranks of one evaluation, as one of them sees them. Without a store it is a single process."""

    rank: int
    world: int
    device: torch.device
    store: Store | None = None
    _done: int = 0  # questions of all ranks that were answered when the ranks last met
    _unsent: int = 0  # questions that this rank has answered since then
    _meet_at: float = 0.0  # time.monotonic() of the next meeting

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which shows progress and writes the results."""
        return self.rank == 0

    def take(self, count: int) -> Iterator[int]:
        """Yield the numbers of units, of ``count`` in all, that this rank works on.

        Raises:
            RankFailedError: another rank failed.
        """
        if self.store is None:
            yield from range(count)
            return
        taken = 0
        while taken < count:
            share = max((count - taken) // (SHARES * self.world), 1)
            taken = self.store.add(_NEXT, share)
            for number in range(taken - share, min(taken, count)):
                self._meet()
                yield number

    def add_done(self, count: int) -> int:
        """Count ``count`` questions as answered; return how many are known to be, over all ranks.

        Raises:
            RankFailedError: another rank failed.
        """
        self._unsent += count
        self._meet()
        return self._done + self._unsent

    def collect(self, value: Any, progress: Callable[[int], None]) -> list[Any] | None:
        """Return the values of all ranks on rank 0, and None on the others, which wait until it has them.

        Args:
            value: of this rank; it is sent as JSON.
            progress: called with the number of questions that all ranks have answered, while rank 0 waits.

        Raises:
            RankFailedError: another rank failed.
        """
        if self.store is None:
            return [json.loads(json.dumps(value))]
        self._report()
        self.store.set(f"evaluation/{self.rank}", json.dumps(value))
        if not self.is_main:
            self._wait([_COLLECTED], lambda: None)
            return None
        keys = [f"evaluation/{rank}" for rank in range(self.world)]
        self._wait(keys, lambda: progress(self.add_done(0)))
        self._report()
        progress(self._done)
        values = [json.loads(text) for text in self.store.multi_get(keys)]
        self.store.set(_COLLECTED, "")
        return values

    def is_first_failure(self) -> bool:
        """Tell the others that this rank failed; return whether it is the first, which says why."""
        return self.store is None or self.store.add(_FAILED, 1) == 1

    def _wait(self, keys: list[str], each_time: Callable[[], None]) -> None:
        """Wait for keys without a limit; the watchdog ends the process if a rank is gone."""
        assert self.store is not None
        while not self.store.check(keys):
            self._meet()
            each_time()
            time.sleep(POLL_SECONDS)

    def _meet(self) -> None:
        """Exchange progress with the other ranks, unless that was a moment ago.

        Raises:
            RankFailedError: another rank failed.
        """
        if self.store is not None and time.monotonic() >= self._meet_at:
            if self.store.check([_FAILED]):
                raise RankFailedError("another rank failed")
            self._report()
            self._meet_at = time.monotonic() + POLL_SECONDS

    def _report(self) -> None:
        assert self.store is not None
        self._done, self._unsent = self.store.add(_DONE, self._unsent), 0


def single_process() -> RankPool:
    """Return the pool of a process without a launcher."""
    return RankPool(0, 1, select_device())


@contextlib.contextmanager
def join_ranks() -> Iterator[RankPool]:
    """Join the processes that torchrun or srun has started; without one of them, this process is alone.

    Raises:
        LaunchError: the launcher's variables are wrong, rank 0 cannot be reached, or there are fewer GPUs than ranks.
    """
    environment = dict(os.environ)
    setup_environment(environment)
    if int(environment["WORLD_SIZE"]) == 1:
        yield single_process()
        return
    from framestream.trainer.distributed.process_group import destroy_process_group, init_process_group  # DeepSpeed
    from framestream.trainer.distributed.watchdog import Watchdog

    context = init_process_group(JOIN_MINUTES)
    try:
        watchdog = Watchdog(JOIN_MINUTES, context)  # ends this process with one line if another is gone
        try:
            watchdog.set_phase("answering questions", no_deadline=True)
            yield RankPool(context.rank, context.world, context.device, open_store(JOIN_MINUTES))
        finally:
            watchdog.close()
    finally:
        destroy_process_group()
