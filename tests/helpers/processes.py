"""Kill a process at a chosen moment."""

from __future__ import annotations

import subprocess
import time


def kill_when(command, ready):
    """Start the command and kill it as soon as ``ready()``; return whether it was killed before its end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if ready():
            process.kill()
            process.wait()
            return process.returncode < 0
        time.sleep(0.001)
    assert process.returncode == 0
    return False
