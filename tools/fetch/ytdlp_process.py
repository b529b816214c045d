"""Run yt-dlp so that it ends, with every process it started, when the process that started it is gone.

Standard input is a pipe that nothing is written to. It reaches its end when the process at its other end exits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import yt_dlp


def kill_group_with_parent() -> None:
    """Wait for the end of standard input, then kill this process group."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=kill_group_with_parent, daemon=True).start()
    yt_dlp.main(sys.argv[1:])
