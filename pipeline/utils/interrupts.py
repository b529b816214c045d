"""Handlers of signals that last for a block: Ctrl-C is kept where KeyboardInterrupt would be lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any


@contextlib.contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """Handle signals in the block, and give them their former handlers after it. Only for the main thread."""
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Keep SIGINT until the end of the block, where it has its usual effect.

    Libraries written in C may drop an exception that is raised while they call Python. In another thread than the main
    one the block changes nothing, because only the main thread gets KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    try:
        with signal_handlers({signal.SIGINT: lambda number, frame: received.append(number)}):
            yield
    finally:
        if received:
            signal.raise_signal(signal.SIGINT)
