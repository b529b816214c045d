"""Memory that tensors free stays with the process: the kernel maps no new pages for the next ones."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from framestream.trainer.training import heap

PROGRAM = """
import resource, sys
import numpy as np
from framestream.trainer.training.heap import keep_freed_memory

print(keep_freed_memory() if "keep" in sys.argv else None)
for first in (True, False):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        arrays = [np.ones(2**20) for _ in range(4)]
        del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*arguments: str, **variables: str) -> list[str]:
    """What the program prints: whether memory is kept, and page faults of 20 times 4 arrays of 8 MiB."""
    clean = {name: value for name, value in os.environ.items() if name not in heap.SETTINGS}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    kept, faults = run("keep")
    assert kept == "True" and int(faults) < 1000
    assert int(run()[1]) > 10 * max(int(faults), 100)


@pytest.mark.parametrize("name", heap.SETTINGS)
def test_a_users_settings_stay(name):
    value = "glibc.malloc.check=0" if name == "GLIBC_TUNABLES" else "131072"
    assert run("keep", **{name: value})[0] == "False"
