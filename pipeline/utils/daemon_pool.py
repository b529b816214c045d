"""A pool of daemon threads for requests to other machines, which do not delay the end of the program.

The threads of ``concurrent.futures`` do: Ctrl-C would wait for a server that does not respond.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class DaemonThreadPool:
    """Up to ``count`` daemon threads, started on demand; the context manager ends them."""

    def __init__(self, count: int) -> None:
        self._count, self._started = count, 0
        self._calls: queue.SimpleQueue[tuple[Future, Callable, object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def __enter__(self) -> DaemonThreadPool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while not self._calls.empty():
            self._calls.get()
        for _ in range(self._started):
            self._calls.put(None)

    def submit(self, call: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Run ``call(item)`` in the next free thread; it can be canceled until then."""
        future: Future[Result] = Future()
        self._calls.put((future, call, item))
        with self._lock:
            if self._started < self._count:
                self._started += 1
                threading.Thread(target=self._work, daemon=True).start()
        return future

    def map(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of ``call`` for each item, in order; its exception is raised at that position."""
        futures = [self.submit(call, item) for item in items]
        return (future.result() for future in futures)

    def _work(self) -> None:
        while job := self._calls.get():
            future, call, item = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(item))
            except BaseException as error:
                future.set_exception(error)
            del job, future, call, item  # keep no references while waiting
