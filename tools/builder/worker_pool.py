"""Tasks in worker processes, where a decoder that crashes or hangs costs the item it was working on and nothing else.

A task is a list of items that one process works through; it says which item it begins and how long that may take. If
it dies, or takes longer, the task is started again in a fresh process. An item during which a process died once is
tried once more, because the cause may lie elsewhere (memory taken by others); after that, or after a time-out, the task
is told to leave it out. Two processes that are lost with one task outside any item end the run. Workers end when the
process that started them is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from framestream.tools.common.errors import WorkerError

CRASHES = 2  #: processes that may die on one item before it is left out, or be lost with one task outside any item
OUTSIDE = 3600.0  #: seconds that a process may be outside any item: starting, writing a shard

#: What a worker calls: run(task, lost items as {item: [reason, attempts]}, careful, report). ``careful``: a process was
#: lost with this task before; work on one item at a time, so that the right one is blamed. ``report(item, counts,
#: seconds)`` announces the item begun (None: between items), what was finished since the last call, and the item's time
#: limit.
Report = Callable[[int | None, Mapping[str, int], float], None]
Run = Callable[[int, Mapping[int, tuple[str, int]], bool, Report], None]

_spawn = multiprocessing.get_context("spawn")


class WorkerPool:
    """Up to ``workers`` processes, started when there is something to do; a context manager that ends them.

    Args:
        make_run: called once in each process with ``arguments``; a function of a module, and picklable arguments.
    """

    def __init__(self, make_run: Callable[..., Run], arguments: tuple, workers: int) -> None:
        self._make_run, self._arguments, self._size = make_run, arguments, workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()

    def run(self, tasks: Iterable[int]) -> Iterator[Mapping[str, int]]:
        """Run ``tasks``; yields what the workers report as finished, as it comes.

        Raises:
            WorkError: a worker failed outside an item: no space on the disk, a bug.
        """
        waiting = deque((task, {}, {}) for task in tasks)
        while True:
            busy = [worker for worker in self._workers if worker.busy]
            while waiting and len(busy) < self._size:
                busy.append(self._idle())
                busy[-1].give(*waiting.popleft())
            if not busy:
                return
            wake = max(min(worker.deadline for worker in busy) - time.monotonic(), 0.0)
            ready = multiprocessing.connection.wait([worker.connection for worker in busy], wake)
            for worker in busy:
                reason = ""
                if worker.connection in ready:
                    try:
                        yield worker.listen()
                    except (EOFError, OSError):
                        reason = "crashed"
                elif worker.deadline <= time.monotonic():
                    reason = "timeout"
                if reason:
                    self._workers.remove(worker)
                    worker.end()
                    waiting.appendleft(worker.after_loss(reason))

    def _idle(self) -> _Worker:
        for worker in self._workers:
            if not worker.busy:
                return worker
        self._workers.append(_Worker(self._make_run, self._arguments))
        return self._workers[-1]


class _Worker:
    """One process as its parent sees it."""

    def __init__(self, make_run: Callable[..., Run], arguments: tuple) -> None:
        self.connection, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(theirs, make_run, arguments), daemon=True)
        with _no_interrupts():
            self._process.start()
        theirs.close()
        self.busy = False
        self.deadline = math.inf  #: when the current item, or what is outside any, takes too long (time.monotonic())

    def give(self, task: int, lost: dict[int, tuple[str, int]], crashes: dict[int | None, int]) -> None:
        """Start ``task`` without the ``lost`` items; ``crashes`` counts the processes that died on each item, and
        under None those that died outside any."""
        self._task, self._lost, self._crashes = task, lost, crashes
        self.busy, self._item, self.deadline = True, None, time.monotonic() + OUTSIDE
        message = {"task": task, "lost": [[item, *why] for item, why in lost.items()], "careful": bool(crashes)}
        with contextlib.suppress(OSError):  # it died while idle; listening will tell
            self.connection.send_bytes(json.dumps(message).encode())

    def listen(self) -> Mapping[str, int]:
        """Take one report; EOFError if the process is gone, WorkError if it gave up."""
        message = json.loads(self.connection.recv_bytes())
        if "error" in message:
            raise WorkerError(message["error"])
        self._item, self.busy = message["item"], not message["ended"]
        self.deadline = time.monotonic() + (OUTSIDE if self._item is None else message["seconds"])
        return message["counts"]

    def after_loss(self, reason: str) -> tuple[int, dict, dict]:
        """The task as it is to be given again after this process was lost."""
        crashes = {**self._crashes, self._item: self._crashes.get(self._item, 0) + 1}
        lost = dict(self._lost)
        if self._item is None:
            if crashes[None] == CRASHES:
                how = f"with exit code {self._process.exitcode}" if reason == "crashed" else f"after {OUTSIDE:g} s"
                raise WorkerError(f"a worker ended {how} outside any item; see its messages above")
        elif reason == "timeout" or crashes[self._item] == CRASHES:
            lost[self._item] = (reason, crashes[self._item])
        return self._task, lost, crashes

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes started meanwhile never get SIGINT, from their first moment on: their parent ends them."""
    multiprocessing.resource_tracker.ensure_running()  # whose own start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, make_run: Callable[..., Run], arguments: tuple) -> None:
    """The life of a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    def report(item: int | None, counts: Mapping[str, int], seconds: float = 0.0) -> None:
        send(item=item, counts=counts, seconds=seconds, ended=False)

    try:
        run = make_run(*arguments)
        while True:
            message = json.loads(connection.recv_bytes())
            lost = {item: tuple(why) for item, *why in message["lost"]}
            run(message["task"], lost, message["careful"], report)
            send(item=None, counts={}, seconds=0.0, ended=True)
    except EOFError:
        pass
    except Exception as error:
        if not isinstance(error, OSError):  # whose line says it all: no space, no such folder
            traceback.print_exc()
        send(error=f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())}")


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
