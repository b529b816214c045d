"""Video pages as a source, through yt-dlp: ``page:https://HOST/watch?v={stem}`` (``pip install -e '.[pages]'``).

yt-dlp runs in its own process group. The group is killed when it takes too long, writes too much, or its parent exits.
It reads no user configuration, runs no commands, and writes only into ``scratch``.
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
from framestream.tools.fetch.http.retry import (
    FetchLimits,
    TransientFetchError,
    timeout_message,
    too_large_message,
    with_retries,
)
from framestream.tools.fetch.url import UrlTemplate

#: Video stream without sound, at most 720 pixels high where there is one. A single stream needs no merging.
VIDEO_FORMAT = "bv*[height<=?720]/bv*"
POLL_SECONDS = 0.1  #: between two checks of the time and of the bytes written
MAX_OUTPUT = 1 << 20  #: bytes of yt-dlp's output that are searched for an error

#: Patterns of yt-dlp's error lines in lower case, and the ledger's reason for each. The first match counts.
ERROR_PATTERNS = (
    ("http error (408|425|429|5..)|timed out", "unreachable"),
    ("http error 403", "denied"),  # also sent by busy servers
    ("unsupported url|requested format", "unsupported"),
    ("private|sign in|log ?in|members|payment|your age|age-restricted|http error 401", "denied"),
    ("unavailable|not available|removed|does not exist|http error 404|http error 410", "missing_file"),
)
TRANSIENT_PATTERNS = 2  #: the first patterns of the list are retried


class PageSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` for the videos of a site, by the URLs of their pages."""

    def __init__(self, template: str, limits: FetchLimits) -> None:
        self._template, self._limits = UrlTemplate("page", template), limits
        self.origin = self._template.redacted
        if importlib.util.find_spec("yt_dlp") is None:
            raise FetchError("unsupported", self.origin, "needs yt-dlp: pip install -e '.[pages]'")

    def find(self, path: str, tree: bool = False) -> int | None:
        """Return UNKNOWN: only a fetch shows whether a page still has its video."""
        self._location(path, tree)
        return UNKNOWN

    def identity(self, path: str, tree: bool = False) -> str:
        """Return an empty text: the video of a page is assumed not to change."""
        self._location(path, tree)
        return ""

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Download the video of a page into ``scratch``."""
        location = self._location(path, tree)
        return with_retries(lambda deadline: self._run(path, location, scratch, deadline), location, self._limits)

    def _location(self, path: str, tree: bool) -> str:
        """Check ``path`` and return its URL for error messages."""
        check_path(self.origin, path)
        if tree:
            raise FetchError("unsupported", f"{self.origin} {path}", "a video page has no folders of frames")
        return self._template.redacted_url(path)

    def _run(self, path: str, location: str, scratch: Path, deadline: float) -> Path:
        """Run yt-dlp once."""
        limits = self._limits
        for item in scratch.iterdir():  # of an earlier attempt
            item.unlink()
        with tempfile.TemporaryFile(dir=scratch) as output:
            command = _command(self._template.url(path), scratch, limits)
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
            try:
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise FetchError("timeout", location, timeout_message(limits))
                    if _bytes_written(scratch) > limits.bytes:
                        raise FetchError("too_large", location, too_large_message(limits))
                    time.sleep(POLL_SECONDS)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if process.stdin:
                    process.stdin.close()
            output.seek(0)
            text = output.read(MAX_OUTPUT).decode("utf-8", "replace")
        files = [item for item in scratch.iterdir() if item.suffix not in (".part", ".ytdl")]
        if process.returncode == 0 and len(files) == 1:
            if files[0].stat().st_size > limits.bytes:
                raise FetchError("too_large", location, too_large_message(limits))
            return files[0]
        if "larger than max-filesize" in text:
            raise FetchError("too_large", location, too_large_message(limits))
        raise _failure(text, location)


def _command(url: str, scratch: Path, limits: FetchLimits) -> list[str]:
    options = ["--ignore-config", "--no-cache-dir", "--no-playlist", "--no-progress", "--no-warnings", "--no-mtime"]
    options += ["--no-exec", "--no-update", "--playlist-items", "1", "--max-filesize", str(limits.bytes)]
    options += ["--socket-timeout", f"{limits.stall:g}", "--retries", str(limits.retries), "--format", VIDEO_FORMAT]
    options += ["--fixup", "never", "--paths", str(scratch), "--output", "media.%(ext)s", "--", url]
    return [sys.executable, "-m", "framestream.tools.fetch.ytdlp_process", *options]


def _bytes_written(folder: Path) -> int:
    total = 0
    for item in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += item.lstat().st_size
    return total


def _failure(output: str, location: str) -> Exception:
    """Return the error that yt-dlp's last error line means; queries and logins are removed from its URLs."""
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines() or ["no message"]
    line = re.sub(r"\?\S+", "?...", re.sub(r"//[^/\s@]*@", "//", lines[-1]))[:500]
    if "no space left on device" in output.lower():
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for number, (pattern, reason) in enumerate(ERROR_PATTERNS):
        if re.search(pattern, line.lower()):
            if number >= TRANSIENT_PATTERNS:
                return FetchError(reason, location, line)
            return TransientFetchError(reason, line, retries=DENIED_RETRIES if reason == "denied" else None)
    return TransientFetchError("unreachable", line)
