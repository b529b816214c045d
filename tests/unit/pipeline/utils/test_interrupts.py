"""Ctrl-C in a block takes effect at its end, once, whatever the block drops."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from framestream.pipeline.utils.interrupts import hold_interrupts


def test_a_signal_takes_effect_at_the_end():
    before, reached = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        with contextlib.suppress(BaseException):  # as a library in C does it
            signal.raise_signal(signal.SIGINT)
        reached.append("end")
    assert reached == ["end"] and signal.getsignal(signal.SIGINT) is before


def test_a_block_without_a_signal_changes_nothing():
    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError), hold_interrupts():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_may_use_it():
    done = []

    def work() -> None:
        with hold_interrupts():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
