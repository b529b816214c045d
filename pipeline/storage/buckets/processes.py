"""Buckets in any process, also in one that was forked after obstore was used.

Such a process starts one of its own for obstore, with which it speaks in lines of JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from multiprocessing import connection
from typing import Any

from framestream.pipeline.storage.buckets.stores import (
    BucketCalls,
    ListedObject,
    split_bucket_url,
    works_in_this_process,
)

ANSWER_TIMEOUT = 300.0  #: seconds for one answer, longer than obstore tries
ERRORS = {kind.__name__: kind for kind in (FileNotFoundError, PermissionError, ConnectionError, ValueError)}


class Bucket:
    """The bucket of ``url`` (see :class:`framestream.pipeline.storage.buckets.stores.BucketCalls`).

    Threads may share it, and so may processes forked after it was used.

    Raises:
        ValueError: the address has another form.
        PermissionError: the login is incomplete, or the account is not named.
    """

    def __init__(self, url: str) -> None:
        self.scheme, self.name, self.folder = split_bucket_url(url)
        self._calls: tuple[object, BucketCalls | _DistantCalls] | None = None
        self._current()

    def sign(self, key: str) -> str:
        """Return the address of an object."""
        return self._current().sign(key)

    def headers(self) -> dict[str, str]:
        """Return what is sent with a request for an object, beside its address."""
        return self._current().headers()

    def files(self, folder: str) -> list[ListedObject]:
        """Return the objects directly in a folder."""
        return self._current().files(folder)

    def _current(self) -> BucketCalls | _DistantCalls:
        with _process.lock:
            if self._calls is None or self._calls[0] is not _process:
                url = f"{self.scheme}://{self.name}"
                self._calls = _process, BucketCalls(url) if works_in_this_process() else _DistantCalls(url)
            return self._calls[1]


class _DistantCalls:
    """The calls of a bucket, made in the process that :class:`_Process` starts."""

    def __init__(self, url: str) -> None:
        self._url = url

    def sign(self, key: str) -> str:
        return _process.call(self._url, "sign", key)

    def headers(self) -> dict[str, str]:
        return _process.call(self._url, "headers", "")

    def files(self, folder: str) -> list[ListedObject]:
        return [ListedObject(**item) for item in _process.call(self._url, "files", folder)]


class _Process:
    """What belongs to this process: its lock, and the process that it has started for obstore."""

    def __init__(self) -> None:
        self.lock, self._calling = threading.Lock(), threading.Lock()
        self._started: subprocess.Popen[str] | None = None

    def call(self, url: str, function: str, argument: str) -> Any:
        with self._calling:
            if self._started is None or self._started.poll() is not None:
                self._started = _start()
            assert self._started.stdin is not None and self._started.stdout is not None
            try:
                self._started.stdin.write(json.dumps([url, function, argument]) + "\n")
                self._started.stdin.flush()
                ready = connection.wait([self._started.stdout.fileno()], ANSWER_TIMEOUT)
                line = self._started.stdout.readline() if ready else ""
            except BaseException:  # the answer that comes would be taken for that of the next call
                self._stop()
                raise
            if not line:
                self._stop()
                raise ConnectionError(f"{url}/{argument}: the process that signs addresses does not answer")
        kind, value = json.loads(line)
        if kind in ERRORS:
            raise ERRORS[kind](value)
        return value

    def _stop(self) -> None:
        if self._started is not None:
            self._started.kill()
            self._started = None


def _start() -> subprocess.Popen[str]:
    """Start this module in a new process, which ends with its standard input."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is for the process that asks
    )


def _answer_calls() -> None:
    """Answer the calls on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    buckets: dict[str, BucketCalls] = {}
    for line in sys.stdin:
        url, function, argument = json.loads(line)
        try:
            if url not in buckets:
                buckets[url] = BucketCalls(url)
            answer: list[Any]
            if function == "sign":
                answer = ["", buckets[url].sign(argument)]
            elif function == "headers":
                answer = ["", buckets[url].headers()]
            else:
                answer = ["", [dataclasses.asdict(item) for item in buckets[url].files(argument)]]
        except tuple(ERRORS.values()) as error:
            kind = next(name for name, known in ERRORS.items() if isinstance(error, known))
            answer = [kind, str(error)]
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


_process = _Process()


def _after_fork() -> None:
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_after_fork)

if __name__ == "__main__":
    _answer_calls()
