"""Video pages through yt-dlp: ``page:https://HOST/watch?v={stem}`` (``pip install -e '.[pages]'``).

yt-dlp runs in a process of its own, which is ended with all it started when it takes too long, writes too much or its
parent is gone. It reads no settings of the user, runs no commands and writes into ``scratch`` alone.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from framestream.tools.fetch.base import UNKNOWN, FetchError, check_path
from framestream.tools.fetch.http.response import DENIED_RETRIES
from framestream.tools.fetch.http.retry import FetchLimits, TransientFetchError, out_of_time, too_large, with_retries
from framestream.tools.fetch.url import UrlTemplate

#: Frames alone are wanted, and not larger than any model takes them; one file, so that nothing needs to be merged.
FORMAT = "bv*[height<=?720]/bv*"
POLL = 0.1  #: seconds between two looks at what has been written
#: What yt-dlp says of pages that cannot be had, in small letters, with the reason for the ledger; the first that fits.
ANSWERS = (
    ("http error (408|425|429|5..)|timed out", "unreachable"),
    ("http error 403", "denied"),  # said by busy servers, too
    ("unsupported url|requested format", "unsupported"),
    ("private|sign in|log ?in|members|payment|your age|age-restricted|http error 401", "denied"),
    ("unavailable|not available|removed|does not exist|http error 404|http error 410", "missing_file"),
)
BUSY = 2  #: so many of them may pass


class PageSource:
    """The videos of a site, by the addresses of their pages (see ``framestream.tools.fetch.base.Source``)."""

    def __init__(self, template: str, limits: FetchLimits) -> None:
        self._template, self._limits = UrlTemplate("page", template), limits
        self.origin = self._template.shown
        if importlib.util.find_spec("yt_dlp") is None:
            raise FetchError("unsupported", self.origin, "needs yt-dlp: pip install -e '.[pages]'")

    def find(self, path: str, tree: bool = False) -> int | None:
        """UNKNOWN: whether a page still has its video shows when it is fetched."""
        self._place(path, tree)
        return UNKNOWN

    def identity(self, path: str, tree: bool = False) -> str:
        """Nothing: a page keeps its video."""
        self._place(path, tree)
        return ""

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Download the video of a page into ``scratch``."""
        place = self._place(path, tree)
        return with_retries(lambda deadline: self._try(path, place, scratch, deadline), place, self._limits)

    def _place(self, path: str, tree: bool) -> str:
        check_path(self.origin, path)
        if tree:
            raise FetchError("unsupported", f"{self.origin} {path}", "a video page has no folders of frames")
        return self._template.place(path)

    def _try(self, path: str, place: str, scratch: Path, deadline: float) -> Path:
        limits = self._limits
        for item in scratch.iterdir():  # of an earlier try
            item.unlink()
        with tempfile.TemporaryFile(dir=scratch) as said:
            command = _command(self._template.address(path), scratch, limits)
            paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(
                command, env=paths, stdin=subprocess.PIPE, stdout=said, stderr=said, start_new_session=True
            )
            try:
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise FetchError("timeout", place, out_of_time(limits))
                    if _written(scratch) > limits.bytes:
                        raise FetchError("too_large", place, too_large(limits))
                    time.sleep(POLL)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdin.close()
            said.seek(0)
            text = said.read(1 << 20).decode("utf-8", "replace")
        found = [item for item in scratch.iterdir() if item.suffix not in (".part", ".ytdl")]
        if process.returncode == 0 and len(found) == 1:
            if found[0].stat().st_size > limits.bytes:
                raise FetchError("too_large", place, too_large(limits))
            return found[0]
        if "larger than max-filesize" in text:
            raise FetchError("too_large", place, too_large(limits))
        raise _failure(text, place)


def _command(address: str, scratch: Path, limits: FetchLimits) -> list[str]:
    options = ["--ignore-config", "--no-cache-dir", "--no-playlist", "--no-progress", "--no-warnings", "--no-mtime"]
    options += ["--no-exec", "--no-update", "--playlist-items", "1", "--max-filesize", str(limits.bytes)]
    options += ["--socket-timeout", f"{limits.stall:g}", "--retries", str(limits.retries), "--format", FORMAT]
    options += ["--fixup", "never", "--paths", str(scratch), "--output", "media.%(ext)s", "--", address]
    return [sys.executable, "-m", "tools.fetch.ytdlp_process", *options]


def _written(folder: Path) -> int:
    total = 0
    for item in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += item.lstat().st_size
    return total


def _failure(text: str, place: str) -> Exception:
    """What yt-dlp's last error means; its line without the queries and logins of addresses."""
    lines = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines() or ["no message"]
    line = re.sub(r"\?\S+", "?...", re.sub(r"//[^/\s@]*@", "//", lines[-1]))[:500]
    if "no space left on device" in text.lower():
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for number, (pattern, reason) in enumerate(ANSWERS):
        if re.search(pattern, line.lower()):
            if number >= BUSY:
                return FetchError(reason, place, line)
            return TransientFetchError(reason, line, retries=DENIED_RETRIES if reason == "denied" else None)
    return TransientFetchError("unreachable", line)
