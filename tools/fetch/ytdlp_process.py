"""yt-dlp as a program that ends, with all it started, when the process that started it is gone.

Standard input is a pipe that nothing is written to: it ends with the process at its other end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import yt_dlp


def end_with_parent() -> None:
    """Wait for the end of standard input, then kill this process group."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    yt_dlp.main(sys.argv[1:])
