"""Run tasks in worker processes, so that a decoder that crashes or hangs loses only its current item.

A task is a list of items that one process works through. The process reports which item it starts, and the time limit
of that item. If it dies or exceeds the limit, the task is started again in a new process.

An item during which a process died is tried once more, because the cause may be elsewhere (other programs that use up
the memory). After a second crash, or after a timeout, the restarted task leaves the item out. If one task loses two
processes outside any item, the run ends with an error. Workers exit when their parent process is gone.
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
from typing import Any, NamedTuple, Protocol, TypeAlias

from framestream.pipeline.media.errors import DecoderError
from framestream.pipeline.utils.interrupts import hold_interrupts
from framestream.tools.common.errors import WorkerError

MAX_CRASHES = 2  #: crashes after which an item is left out, or a task that crashed outside any item ends the run
OUTSIDE_SECONDS = 3600.0  #: seconds that a process may spend outside any item, such as starting or writing a shard

LostItems: TypeAlias = Mapping[int, tuple[str, int]]  # items to leave out, with reason and number of attempts


class Report(Protocol):
    """Report progress to the parent.

    Args:
        item: the item that starts; None between items.
        counts: what was finished since the last call.
        seconds: time limit of the item.
    """

    def __call__(self, item: int | None, counts: Mapping[str, int], seconds: float = 0.0) -> None: ...


#: What a worker calls: run(task, lost, careful, report). With ``careful`` a process was lost with this task before, so
#: it must work on one item at a time: then the right item is blamed.
Run: TypeAlias = Callable[[int, LostItems, bool, Report], None]

_spawn = multiprocessing.get_context("spawn")


class _TaskState(NamedTuple):
    """A task that is to be started, or started again."""

    task: int
    lost: LostItems = {}  #: items to leave out
    crashes: Mapping[int | None, int] = {}  #: processes that died on each item; under None those outside any item


class WorkerPool:
    """Up to ``workers`` processes, started on demand. A context manager that stops them at its end.

    Args:
        make_run: called once in each process with ``arguments``. It must be a module-level function, and the arguments
            picklable.
    """

    def __init__(self, make_run: Callable[..., Run], arguments: tuple, workers: int) -> None:
        self._make_run, self._arguments, self._size = make_run, arguments, workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.stop()

    def run(self, tasks: Iterable[int]) -> Iterator[Mapping[str, int]]:
        """Run ``tasks``. Yields counts of what was finished, as the workers report them.

        Raises:
            WorkerError: a worker failed outside any item, because of a full disk or a bug.
        """
        waiting = deque(_TaskState(task) for task in tasks)
        while True:
            busy = [worker for worker in self._workers if worker.busy]
            while waiting and len(busy) < self._size:
                busy.append(self._idle_worker())
                busy[-1].start_task(waiting.popleft())
            if not busy:
                return
            seconds = max(min(worker.deadline for worker in busy) - time.monotonic(), 0.0)
            ready = multiprocessing.connection.wait([worker.connection for worker in busy], seconds)
            for worker in busy:
                reason = ""
                if worker.connection in ready:
                    try:
                        yield worker.receive()
                    except (EOFError, OSError):
                        reason = "crashed"
                elif worker.deadline <= time.monotonic():
                    reason = "timeout"
                if reason:
                    self._workers.remove(worker)
                    worker.stop()
                    waiting.appendleft(worker.task_after_loss(reason))

    def _idle_worker(self) -> _Worker:
        for worker in self._workers:
            if not worker.busy:
                return worker
        self._workers.append(_Worker(self._make_run, self._arguments))
        return self._workers[-1]


class _Worker:
    """One worker process, as its parent sees it."""

    def __init__(self, make_run: Callable[..., Run], arguments: tuple) -> None:
        self.connection, worker_end = _spawn.Pipe()
        self._process = _spawn.Process(target=_worker_main, args=(worker_end, make_run, arguments), daemon=True)
        with _sigint_blocked():
            self._process.start()
        worker_end.close()
        self.busy = False
        self.deadline = math.inf  #: time.monotonic() at which the item, or the work between items, takes too long

    def start_task(self, state: _TaskState) -> None:
        """Send a task to the process."""
        self._state = state
        self._item: int | None = None
        self.busy, self.deadline = True, time.monotonic() + OUTSIDE_SECONDS
        lost = [[item, *reason] for item, reason in state.lost.items()]
        message = {"task": state.task, "lost": lost, "careful": bool(state.crashes)}
        with contextlib.suppress(OSError):  # the process died while idle: receive() will raise
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> Mapping[str, int]:
        """Receive one report.

        Raises:
            EOFError, OSError: the process is gone.
            WorkerError: the process reported an error.
        """
        message = json.loads(self.connection.recv_bytes())
        if "error" in message:
            raise WorkerError(message["error"])
        self._item, self.busy = message["item"], not message["ended"]
        self.deadline = time.monotonic() + (OUTSIDE_SECONDS if self._item is None else message["seconds"])
        return message["counts"]

    def task_after_loss(self, reason: str) -> _TaskState:
        """Return the task for its next process, after this process was lost."""
        task, lost, crashes = self._state.task, dict(self._state.lost), dict(self._state.crashes)
        crashes[self._item] = crashes.get(self._item, 0) + 1
        if self._item is None:
            if crashes[None] == MAX_CRASHES:
                cause = (
                    f"with exit code {self._process.exitcode}"
                    if reason == "crashed"
                    else f"after {OUTSIDE_SECONDS:g} s"
                )
                raise WorkerError(f"a worker ended {cause} outside any item; see its messages above")
        elif reason == "timeout" or crashes[self._item] == MAX_CRASHES:
            lost[self._item] = (reason, crashes[self._item])
        return _TaskState(task, lost, crashes)

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT, so that processes started here never receive it: their parent stops them.

    The mask holds for this thread alone. The kernel may give the signal to another thread, and Python would then raise
    KeyboardInterrupt here, with a process half started.
    """
    with hold_interrupts():
        multiprocessing.resource_tracker.ensure_running()  # else it starts later, and its start unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_main(connection: Connection, make_run: Callable[..., Run], arguments: tuple) -> None:
    """Run in a worker process until its parent closes the connection."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def send(**message: Any) -> None:
        connection.send_bytes(json.dumps(message).encode())

    def report(item: int | None, counts: Mapping[str, int], seconds: float = 0.0) -> None:
        send(item=item, counts=counts, seconds=seconds, ended=False)

    try:
        run = make_run(*arguments)
        while True:
            message = json.loads(connection.recv_bytes())
            lost = {item: (reason, attempts) for item, reason, attempts in message["lost"]}
            run(message["task"], lost, message["careful"], report)
            send(item=None, counts={}, seconds=0.0, ended=True)
    except EOFError:
        pass
    except Exception as error:
        if not isinstance(error, (OSError, DecoderError)):  # one line is enough for no space, or a missing folder
            traceback.print_exc()
        send(error=f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())}")


def _exit_with_parent() -> None:
    """Wait until the parent is gone, then exit at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # runs in workers only
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
