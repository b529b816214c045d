"""Threads for requests: order, number, errors, and that the program ends while they wait."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from tests.helpers.paths import ROOT


def test_results_come_in_order_from_several_threads_at_once():
    together = threading.Barrier(4)

    def call(item):
        if item < 4:
            together.wait(60)
        return item, threading.current_thread()

    with DaemonThreadPool(4) as threads:
        found = [*threads.map(call, range(50)), *threads.map(call, range(4, 8))]
    assert [item for item, _ in found] == [*range(50), *range(4, 8)]
    assert len({thread for _, thread in found}) == 4
    assert list(DaemonThreadPool(2).map(call, [])) == []


def test_an_error_comes_when_it_is_its_turn_and_ends_what_is_left():
    gate, done = threading.Event(), []

    def call(item):
        if item == 1:
            raise ValueError("one")
        if item == 2:
            gate.wait(60)
        done.append(item)

    with pytest.raises(ValueError, match="one"), DaemonThreadPool(1) as threads:
        list(threads.map(call, range(50)))
    gate.set()
    assert set(done) <= {0, 2}


def test_a_call_can_be_cancelled_until_a_thread_takes_it():
    gate, taken, ran = threading.Event(), threading.Event(), []

    def call(item):
        taken.set()
        gate.wait(60)
        ran.append(item)

    with DaemonThreadPool(1) as threads:
        futures = [threads.submit(call, item) for item in range(3)]
        taken.wait(60)
        assert [future.cancel() for future in futures[:2]] == [False, True]
        gate.set()
        futures[2].result(60)
    assert ran == [0, 2]


def test_a_program_ends_while_threads_wait():
    code = """
import threading, time
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
begun = threading.Event()
def call(item):
    begun.set()
    time.sleep(3600)
with DaemonThreadPool(2) as threads:
    threads.map(call, range(5))
    begun.wait()
"""
    folder = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=folder, check=True, timeout=60)
