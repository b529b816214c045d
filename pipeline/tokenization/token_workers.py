"""Call a function for many tasks, in this process or in several, and return the results in the order of the tasks.

A worker process is started as ``python -c``, so it does not run the script of its parent again. It shares no thread and
no open file with the parent but a socket, over which the function, the tasks and the results are pickled. It ends when
the socket is closed, however the parent ended. Ctrl-C reaches the parent alone, which then kills its workers.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from framestream.pipeline.shards.index import ShardsError

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from framestream.pipeline.tokenization.token_workers import serve; serve(int(sys.argv[2]))"
)
#: a worker has one core: the threads of its libraries would only take the cores of the others
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def map_in_order(function: Callable[..., Any], tasks: Sequence[tuple], processes: int) -> Generator[Any, None, None]:
    """Yield ``function(*task)`` for each of ``tasks``. Close the iterator, so that the processes end.

    Args:
        function: picklable, as are its arguments and results. An exception that it raises is raised here.
        tasks: its arguments.
        processes: how many run at a time; with one, it is this process.

    Raises:
        ShardsError: a process cannot be started, or died; one line.
    """
    if processes <= 1:
        for task in tasks:
            yield function(*task)
        return
    pickled = ForkingPickler.dumps(function)
    workers: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(processes, "tokenize")  # each waits for the answer of one process

    def run(task: tuple) -> Any:
        worker = idle.get()
        try:
            return worker.call(task)
        finally:
            idle.put(worker)

    try:
        for _ in range(processes):
            workers.append(_Worker(pickled))
            idle.put(workers[-1])
        for result in [threads.submit(run, task) for task in tasks]:
            yield result.result()
    finally:
        for worker in workers:
            worker.kill()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that calls one function, for one task at a time.

    Args:
        function: pickled. It is sent with the first task, because the process reads it only once it has started.
    """

    def __init__(self, function: memoryview) -> None:
        self._function: memoryview | None = function
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            command = [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno())]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env={**os.environ, **_ENVIRONMENT},
                )
            except OSError as error:
                raise ShardsError(f"cannot start a process that tokenizes ({error.strerror}){_FIX}") from None

    def call(self, task: tuple) -> Any:
        try:
            if self._function is not None:
                self._connection.send_bytes(self._function)
                self._function = None
            self._connection.send(task)
            succeeded, result = self._connection.recv()
        except (EOFError, ConnectionError):
            raise ShardsError(f"process {self._process.pid} that tokenizes {self._exit_text()}{_FIX}") from None
        if not succeeded:
            raise result
        return result

    def kill(self) -> None:
        """End the process. A thread that waits for its answer gets an error."""
        self._process.kill()
        self._process.wait()

    def _exit_text(self) -> str:
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


_FIX = "; run the same command to go on with the rest; if memory ran out, allow fewer cores (taskset -c 0-3 COMMAND)"


def serve(descriptor: int) -> None:
    """Answer tasks in a worker process, until its parent is gone."""
    connection = Connection(descriptor)
    try:
        function = connection.recv()
        while True:
            task = connection.recv()
            try:
                answer = True, function(*task)
            except Exception as error:
                answer = False, error
            connection.send(answer)
    except (EOFError, ConnectionError):
        return
