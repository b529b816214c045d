"""Threads for requests to other machines, which do not hold up a program that wants to end.

The threads of ``concurrent.futures`` do: Ctrl-C would wait for a server that says nothing.
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


class Threads:
    """Up to ``count`` daemon threads, started when there is something to do; a context manager that ends them."""

    def __init__(self, count: int) -> None:
        self._count, self._started = count, 0
        self._calls: queue.SimpleQueue[tuple[Future, Callable, object] | None] = queue.SimpleQueue()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while not self._calls.empty():
            self._calls.get()
        for _ in range(self._started):
            self._calls.put(None)

    def map(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What ``call`` returns for each item, in their order; what it raises is raised when its turn comes."""
        futures: list[Future[Result]] = []
        for item in items:
            futures.append(Future())
            self._calls.put((futures[-1], call, item))
            if self._started < self._count:
                self._started += 1
                threading.Thread(target=self._work, daemon=True).start()
        return (future.result() for future in futures)

    def _work(self) -> None:
        while given := self._calls.get():
            future, call, item = given
            try:
                future.set_result(call(item))
            except BaseException as error:
                future.set_exception(error)
