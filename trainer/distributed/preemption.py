"""Leaving when asked: SIGTERM and SIGUSR1 end a run at the next micro-step, after a checkpoint, on all ranks together.

Schedulers send these before they take a machine away, to every rank or to one; the ranks agree by a collective call.
Parameters change only where a global batch ends, so the checkpoint is that of the last whole one, and what was
computed of the next is done again.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from framestream.trainer.distributed.launchers import PREEMPTION_SIGNALS
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max_int


class Preempted(Exception):
    """The run was asked to leave; the name of the signal."""


class PreemptionHandler:
    """Takes both signals over, for the rest of the process. Repeated ones change nothing."""

    def __init__(self) -> None:
        self._asked = 0
        self._held = False
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._heed)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        first, self._asked = not self._asked, self._asked or number
        if first and not self._held:
            raise Preempted(signal.Signals(number).name)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a request waits for :meth:`check`; elsewhere it raises :class:`Preempted` at once."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def raise_if_preempted(self, place: DistributedContext) -> None:
        """Raise :class:`Preempted` on every rank if any was asked. Every rank calls this at the same point."""
        asked = all_reduce_max_int(self._asked, place)
        if asked:
            self._asked = asked
            raise Preempted(signal.Signals(asked).name)
