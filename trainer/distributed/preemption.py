"""Graceful preemption: on SIGTERM or SIGUSR1, save a checkpoint and exit.

Schedulers send these signals before they take a machine away, to all ranks or to one. The ranks agree by a collective
call, so all of them stop at the same micro-step. Parameters change only at the end of a global batch. So the checkpoint
is that of the last complete global batch, and the micro-steps after it are repeated in the next run.

Python runs the handler of a signal between its own instructions. A rank that waits for another one is inside native
code, where no handler runs. So a thread learns of each signal, too, and ends a process that does not react to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from framestream.pipeline.utils.command_line import EXIT_STOPPED
from framestream.pipeline.utils.interrupts import signal_handlers
from framestream.trainer.distributed.launchers import EXIT_PREEMPTED, PREEMPTION_SIGNALS, RESUME_HINT
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max_int

REACTION_SECONDS = 3.0  #: until a process that has nothing to save, and does not react to a signal, is ended


class Preempted(Exception):
    """A signal asked the run to stop. The message is the name of the signal. ``everywhere``: all ranks raise this."""

    def __init__(self, name: str, everywhere: bool = False) -> None:
        super().__init__(name)
        self.everywhere = everywhere


class PreemptionHandler:
    """Handles both signals, and Ctrl-C, in a ``with`` block. Further signals of preemption have no effect."""

    def __init__(self) -> None:
        self._signal = 0
        self._deferred = False
        self._block = contextlib.ExitStack()

    def __enter__(self) -> PreemptionHandler:
        handlers = dict.fromkeys(PREEMPTION_SIGNALS, self._handle)
        self._block.enter_context(signal_handlers({**handlers, signal.SIGINT: signal.default_int_handler}))
        arrivals, arrive = os.pipe()
        os.set_blocking(arrive, False)
        self._block.callback(os.close, arrive)
        self._block.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(arrive, warn_on_full_buffer=False))
        threading.Thread(target=self._watch, args=(arrivals,), daemon=True, name="signals").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self._signal = not self._signal, self._signal or number
        if is_first and not self._deferred:
            raise Preempted(signal.Signals(number).name)

    def _watch(self, arrivals: int) -> None:
        """End the process at a signal that it does not react to. Runs in a thread, which the interpreter wakes."""
        preempted = False
        while arrived := os.read(arrivals, 1):
            number = arrived[0]
            if number in PREEMPTION_SIGNALS and not preempted:
                preempted = True
                if not self._deferred:
                    _end_process(f"stopped by {signal.Signals(number).name}", EXIT_PREEMPTED)
            elif number == signal.SIGINT:
                _end_process("stopped", EXIT_STOPPED)
        os.close(arrivals)

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
            raise Preempted(signal.Signals(number).name, everywhere=True)


def _end_process(line: str, status: int) -> None:
    """Give the process time to end by itself, then print ``line`` and end it. Checkpoints stay complete."""
    time.sleep(REACTION_SECONDS)
    with contextlib.suppress(OSError, ValueError):
        print(f"{line}; {RESUME_HINT}", file=sys.stderr, flush=True)
    os._exit(status)
