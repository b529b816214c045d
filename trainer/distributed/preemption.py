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

from trainer.distributed.launchers import SIGNALS
from trainer.distributed.process_group import Place, highest


class Preempted(Exception):
    """The run was asked to leave; the name of the signal."""


class Leave:
    """Takes both signals over, for the rest of the process. Repeated ones change nothing."""

    def __init__(self) -> None:
        self._asked = 0
        self._held = False
        for number in SIGNALS:
            signal.signal(number, self._heed)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        first, self._asked = not self._asked, self._asked or number
        if first and not self._held:
            raise Preempted(signal.Signals(number).name)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block a request waits for :meth:`check`; elsewhere it raises :class:`Preempted` at once."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def check(self, place: Place) -> None:
        """Raise :class:`Preempted` on every rank if any was asked. Every rank calls this at the same point."""
        asked = highest(self._asked, place)
        if asked:
            self._asked = asked
            raise Preempted(signal.Signals(asked).name)
