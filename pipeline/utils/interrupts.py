"""Keep Ctrl-C where KeyboardInterrupt would be lost, or would leave something half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


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
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)
