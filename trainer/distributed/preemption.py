"""Graceful preemption: on SIGTERM or SIGUSR1, save a checkpoint and exit.

Schedulers send these signals before they take a machine away, to all ranks or to one. The ranks agree by a collective
call, so all of them stop at the same micro-step. Parameters change only at the end of a global batch. So the checkpoint
is that of the last complete global batch, and the micro-steps after it are repeated in the next run.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from framestream.trainer.distributed.launchers import PREEMPTION_SIGNALS
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max_int


class Preempted(Exception):
    """A signal asked the run to stop. The message is the name of the signal."""


class PreemptionHandler:
    """Handles both signals for the rest of the process. Further signals have no effect."""

    def __init__(self) -> None:
        self._signal = 0
        self._deferred = False
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self._signal = not self._signal, self._signal or number
        if is_first and not self._deferred:
            raise Preempted(signal.Signals(number).name)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer a signal to the next :meth:`raise_if_preempted`. Outside the block it raises :class:`Preempted`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if_preempted(self, context: DistributedContext) -> None:
        """Raise :class:`Preempted` on every rank if one has received a signal. All ranks call this together."""
        number = all_reduce_max_int(self._signal, context)
        if number:
            self._signal = number
            raise Preempted(signal.Signals(number).name)
