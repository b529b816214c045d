"""Ctrl-C in a block takes effect at its end, once, whatever the block drops."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading

import pytest

from framestream.pipeline.utils.interrupts import hold_interrupts
from tests.helpers.paths import ROOT


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


def test_arrow_s_first_conversion_does_not_lose_it():
    """Arrow tries to import pandas then, in Python and in C++, which goes on after every exception."""
    code = """
import os, signal, sys
class Finder:
    tried = 0
    def find_spec(self, name, path=None, target=None):
        self.tried += name == "pandas"
        if name == "pandas" and self.tried == 2:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
import framestream.pipeline.utils.arrow_mmap
import pyarrow
pyarrow.chunked_array([[0]]).to_numpy()
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGINT and "KeyboardInterrupt" in ran.stderr
