"""Decode in worker processes, for machines where one process is too slow for the training step.

Each worker is :mod:`framestream.pipeline.loading.decode_worker`, with threads of its own. Tasks are sent over a socket.
Pixels return through memory that both processes map (:mod:`framestream.pipeline.loading.buffer_pool`). If a worker
dies, the run ends with one line that says how. Workers end when the process that started them is gone, however it
ended.
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
from typing import Any

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading.buffer_pool import BufferPool
from framestream.pipeline.loading.decode_threads import DecodeItem, DecodeTask, FrameSource, LoaderError

TASKS_PER_THREAD = 2  #: tasks of a worker for each of its threads, so that no thread waits for the next task
MAX_MESSAGE = 1 << 20  #: bytes; larger than any message
STARTUP_LIMIT = 300.0  #: seconds in which a new worker must send its first message
SILENCE_LIMIT = 30.0  #: seconds without a message after which a worker is given up; it should send one every second
#: The child gets this process's sys.path, so that it finds the same packages whatever its own start-up would add.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from framestream.pipeline.loading.decode_worker import main; main(sys.argv[2:])"
)


class DecodeWorkerError(LoaderError):
    """A decoding process died or failed; one line that says which, how, and what it was reading."""


@dataclass(slots=True, eq=False)
class _Worker:
    name: str
    process: subprocess.Popen[bytes]
    socket: socket.socket
    tasks: dict[int, DecodeTask] = field(default_factory=dict)  #: sent to it and not done, by number
    buffers: set[int] = field(default_factory=set)  #: numbers of the buffers that it has mapped
    #: seconds since its last message, without times in which this process was stopped; below 0 for the time to start
    silence: float = SILENCE_LIMIT - STARTUP_LIMIT


class ProcessDecoder:
    """A :class:`framestream.pipeline.loading.decode_threads.Decoder` of ``manifest.loader.workers`` processes.

    Args:
        manifest: tells the workers what to open and how to decode it.
        source: reads the same media as the workers; for messages.
        pool: gives the buffers of the tasks.

    Raises:
        DecodeWorkerError: a process cannot be started.
    """

    def __init__(self, manifest: Manifest, source: FrameSource, pool: BufferPool) -> None:
        self._source, self._pool = source, pool
        self._max_tasks = TASKS_PER_THREAD * manifest.loader.threads  # of one worker
        self._waiting: deque[DecodeTask] = deque()
        self._task_numbers = itertools.count()
        self._live_buffers: set[int] = set()
        # Protects the tasks: the consumer's thread adds them, and the listening thread removes those that are done.
        self._lock = threading.Lock()
        self._failure: DecodeWorkerError | None = None
        self._closed = False
        self._workers: list[_Worker] = []
        count = manifest.loader.workers
        try:
            for number in range(count):
                self._workers.append(_start(f"decoding worker {number + 1} of {count}", manifest))
        except OSError as error:
            self._kill_workers()
            raise DecodeWorkerError(f"cannot start a decoding worker ({error}); lower loader.workers") from None
        self._listener = threading.Thread(target=self._listen, name="decode-listen", daemon=True)
        self._listener.start()

    def submit(self, task: DecodeTask) -> None:
        """Decode ``task``, then call :attr:`DecodeTask.done`. Only the thread of the pool may call it."""
        live = self._pool.numbers
        with self._lock:
            self._live_buffers = live
            self._waiting.append(task)
            self._send_waiting()

    def raise_if_failed(self) -> None:
        """Check the workers.

        Raises:
            DecodeWorkerError: a worker died, failed or hangs.
        """
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Kill all workers."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._kill_workers()
        self._listener.join()
        for worker in self._workers:
            worker.socket.close()

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()

    def _send_waiting(self) -> None:
        """Send waiting tasks to the workers with the fewest tasks. The caller holds the lock."""
        while self._waiting and not self._failure:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            if len(worker.tasks) >= self._max_tasks:
                return
            task, number = self._waiting.popleft(), next(self._task_numbers)
            worker.tasks[number] = task
            if task.buffer is None:
                raise ValueError("a task for worker processes needs a buffer of shared memory")
            buffer = task.buffer.number
            unused = worker.buffers - self._live_buffers - {buffer}  # which the worker can unmap
            new = buffer not in worker.buffers
            worker.buffers = (worker.buffers - unused) | {buffer}
            message = {
                "task": number,
                "buffer": buffer,
                "shape": task.pixels.shape,
                "items": [_to_json(item) for item in task.items],
                "unused": sorted(unused),
            }
            descriptors = [task.buffer.descriptor] if new else []
            try:
                socket.send_fds(worker.socket, [json.dumps(message).encode()], descriptors)
            except OSError:  # the worker is gone: the listener reports how
                return

    def _listen(self) -> None:
        """Receive messages of workers, in a thread of its own, until they are closed or one fails."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.socket, selectors.EVENT_READ, worker)
            before = time.monotonic()
            while not self._closed and not self._failure:
                ready = [key.data for key, _ in selector.select(1.0)]
                for worker in ready:
                    worker.silence = 0.0
                    self._receive(worker)
                now = time.monotonic()
                for worker in self._workers:
                    # select returns within a second: after a longer gap this process was stopped, maybe its workers too
                    worker.silence += min(now - before, 2.0) if worker not in ready else 0.0
                    if worker.silence > SILENCE_LIMIT:
                        self._fail(worker, f"has sent nothing for {SILENCE_LIMIT:g} s", self._hint(worker))
                before = now

    def _receive(self, worker: _Worker) -> None:
        message = json.loads(_next_message(worker.socket) or b'{"end": true}')
        if message.get("end"):
            self._fail(worker, _exit_text(worker.process), self._hint(worker))
        elif "error" in message:
            self._fail(worker, f"failed: {message['error']}")
        elif "task" in message:
            with self._lock:
                task = worker.tasks.pop(message["task"])
                self._send_waiting()
            task.failed = {int(item): reason for item, reason in message["failed"].items()}
            task.stuck = message["stuck"]
            task.done(task)

    def _fail(self, worker: _Worker, problem: str, hint: str = "") -> None:
        with self._lock:
            if not self._closed and not self._failure:
                self._failure = DecodeWorkerError(f"{worker.name} (process {worker.process.pid}) {problem}{hint}")

    def _hint(self, worker: _Worker) -> str:
        """Return likely causes and the fix, for a worker that did not report a reason itself."""
        with self._lock:
            items = [item for task in worker.tasks.values() for item in task.items]
        media = "; ".join(dict.fromkeys(self._source.describe(item.view) for item in items[:3]))
        return (
            f", while it was reading {media or 'nothing'}; run the same command to resume from the last checkpoint; if "
            f"memory ran out, lower loader.workers or loader.prefetch_mb"
        )


def _start(name: str, manifest: Manifest) -> _Worker:
    # SEQPACKET keeps message boundaries, and a message can carry the file descriptor of a buffer
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
    with theirs:
        command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its workers
        )
    assert process.stdin is not None  # because of PIPE
    with contextlib.suppress(BrokenPipeError), process.stdin:  # the worker is gone: the socket reports it too
        process.stdin.write(json.dumps(to_dict(manifest)).encode())
    return _Worker(name, process, ours)


def _next_message(channel: socket.socket) -> bytes:
    """Return the next message; empty at the end."""
    try:
        return channel.recv(MAX_MESSAGE)
    except ConnectionResetError:  # comes first if the worker ended without reading all; its messages are still there
        return channel.recv(MAX_MESSAGE)


def _exit_text(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(5)
    except subprocess.TimeoutExpired:
        return "closed its socket"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _to_json(item: DecodeItem) -> dict[str, Any]:
    """Return an item as JSON, with only those frames of its view that are read, and without the time message."""
    view = {name: getattr(item.view, name) for name in item.view.__slots__}
    view["frame_indices"] = item.view.frame_indices[item.start : item.start + item.count].tolist()
    return {"view": {**view, "message": ""}, "offset": item.offset, "count": item.count}
