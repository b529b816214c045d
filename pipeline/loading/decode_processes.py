"""Decoding in worker processes, for machines where one process cannot feed the training step.

Each worker is :mod:`framestream.pipeline.loading.decode_worker`, with threads of its own. Tasks go to it over a socket; pixels come back through
memory that both have mapped (:mod:`framestream.pipeline.loading.buffer_pool`). A worker that dies ends the run with one line that says how;
workers end when the process that started them is gone, however it ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from framestream.pipeline.config.manifest import Manifest, to_dict
from framestream.pipeline.loading.buffer_pool import BufferPool
from framestream.pipeline.loading.decode_threads import DecodeItem, DecodeTask, FrameSource, LoaderError

AHEAD = 2  #: tasks that a worker has for each of its threads, so that none waits for the next
MESSAGE = 1 << 20  #: bytes; longer than any message
STARTING = 300.0  #: seconds after which a new worker must have said something
SILENT = 30.0  #: seconds after which a worker that says nothing, where it should every second, is given up
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from framestream.pipeline.loading.decode_worker import main; main(sys.argv[2:])"


class DecodeWorkerError(LoaderError):
    """A decoding process died, or failed; one line that says which, how, and what it was reading."""


@dataclass(slots=True, eq=False)
class _Worker:
    name: str
    process: subprocess.Popen
    socket: socket.socket
    tasks: dict[int, DecodeTask] = field(default_factory=dict)  #: given to it, by number
    buffers: set[int] = field(default_factory=set)  #: that it has mapped
    silence: float = SILENT - STARTING  #: seconds since it said something, while this process was awake


class ProcessDecoder:
    """``manifest.loader.workers`` processes that work through tasks in the order they are given.

    Args:
        manifest: says what the workers open, and how they decode.
        source: the same pixels as the workers read; for messages.
        pool: whose buffers the tasks are decoded into.
    """

    def __init__(self, manifest: Manifest, source: FrameSource, pool: BufferPool) -> None:
        self._source, self._pool = source, pool
        self._most = AHEAD * manifest.loader.threads
        self._waiting: deque[DecodeTask] = deque()
        self._numbers = itertools.count()
        self._live: set[int] = set()
        self._lock = threading.Lock()
        self._failure: DecodeWorkerError | None = None
        self._closed = False
        self._workers: list[_Worker] = []
        count = manifest.loader.workers
        try:
            for number in range(count):
                self._workers.append(_start(f"decoding worker {number + 1} of {count}", manifest))
        except OSError as error:
            self._end()
            raise DecodeWorkerError(f"a decoding worker cannot be started ({error}); lower loader.workers") from None
        self._listener = threading.Thread(target=self._listen, name="decode-listen", daemon=True)
        self._listener.start()

    def submit(self, task: DecodeTask) -> None:
        """Decode ``task``; :attr:`Task.done` tells when. Called by one thread, that of the pool."""
        live = self._pool.numbers
        with self._lock:
            self._live = live
            self._waiting.append(task)
            self._deal()

    def raise_if_failed(self) -> None:
        """Raise what has become of a worker.

        Raises:
            WorkerError: a worker died, failed or hangs.
        """
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """End all workers at once."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._end()
        self._listener.join()
        for worker in self._workers:
            worker.socket.close()

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    def _deal(self) -> None:
        """Give waiting tasks to the workers that have the fewest; the lock is held."""
        while self._waiting and not self._failure:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            if len(worker.tasks) >= self._most:
                return
            task, number = self._waiting.popleft(), next(self._numbers)
            worker.tasks[number] = task
            gone = worker.buffers - self._live - {task.buffer.number}
            new = task.buffer.number not in worker.buffers
            worker.buffers = (worker.buffers - gone) | {task.buffer.number}
            message = {
                "task": number,
                "buffer": task.buffer.number,
                "shape": task.media_reader.shape,
                "items": [_plain(item) for item in task.items],
                "gone": sorted(gone),
            }
            files = [task.buffer.descriptor] if new else []
            try:
                socket.send_fds(worker.socket, [json.dumps(message).encode()], files)
            except OSError:  # it is gone: the listener says how
                return

    def _listen(self) -> None:
        """Take what workers say, in a thread of its own, until they are ended or one is lost."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.socket, selectors.EVENT_READ, worker)
            before = time.monotonic()
            while not self._closed and not self._failure:
                heard = [key.data for key, _ in selector.select(1.0)]
                for worker in heard:
                    worker.silence = 0.0
                    self._hear(worker)
                now = time.monotonic()
                for worker in self._workers:  # a gap of minutes: this process was stopped too
                    worker.silence += min(now - before, 2.0) if worker not in heard else 0.0
                    if worker.silence > SILENT:
                        self._lose(worker, f"has said nothing for {SILENT:g} s", self._hint(worker))
                before = now

    def _hear(self, worker: _Worker) -> None:
        message = json.loads(_received(worker.socket) or b'{"end": true}')
        if message.get("end"):
            self._lose(worker, _how(worker.process), self._hint(worker))
        elif "error" in message:
            self._lose(worker, f"failed: {message['error']}")
        elif "task" in message:
            with self._lock:
                task = worker.tasks.pop(message["task"])
                self._deal()
            task.failed = {int(place): reason for place, reason in message["failed"].items()}
            task.stuck = message["stuck"]
            task.done(task)

    def _lose(self, worker: _Worker, how: str, hint: str = "") -> None:
        with self._lock:
            if not self._closed and not self._failure:
                self._failure = DecodeWorkerError(f"{worker.name} (process {worker.process.pid}) {how}{hint}")

    def _hint(self, worker: _Worker) -> str:
        """What may have been the matter where the worker itself said nothing."""
        with self._lock:
            items = [item for task in worker.tasks.values() for item in task.items]
        media = "; ".join(dict.fromkeys(self._source.describe(item.view) for item in items[:3]))
        return (
            f", having been given {media or 'nothing'}; the same command goes on from the last checkpoint; if memory "
            f"ran out, lower loader.workers or loader.prefetch_mb"
        )


def _start(name: str, manifest: Manifest) -> _Worker:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE)
    with theirs:
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its workers
        )
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it is gone: the socket says so too
        process.stdin.write(json.dumps(to_dict(manifest)).encode())
    return _Worker(name, process, ours)


def _received(channel: socket.socket) -> bytes:
    """The next message; empty at the end."""
    try:
        return channel.recv(MESSAGE)
    except ConnectionResetError:  # told first where it ended without reading all; what it said is still there
        return channel.recv(MESSAGE)


def _how(process: subprocess.Popen) -> str:
    try:
        status = process.wait(5)
    except subprocess.TimeoutExpired:
        return "closed its socket"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _plain(item: DecodeItem) -> dict:
    """An item as JSON; of the view's places only those that are read."""
    view = {name: getattr(item.view, name) for name in item.view.__slots__}
    view["places"] = item.view.frame_indices[item.start : item.start + item.count].tolist()
    return {"view": {**view, "message": ""}, "at": item.at, "count": item.count}
