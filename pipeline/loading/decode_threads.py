"""Decoding in threads, with a time limit for every item.

A task is a list of items, media or parts of them, that one thread decodes one after the other into the pictures of a
row. An item that cannot be read, or takes too long, fails alone. A thread that is stuck in a read cannot be stopped:
it is given up, another one takes its place, and what it still does is ignored.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from framestream.pipeline.loading.buffer_pool import Buffer
from framestream.pipeline.shards.media_view import MediaView

GRACE = 2.0  #: seconds over ``loader.read_timeout``, in which a reader with that limit says itself what it waited for
CHUNK = 32  #: pictures of a task, where an item has not more


class LoaderError(RuntimeError):
    """Reading cannot go on; one line that says why."""


class FrameSource(Protocol):
    """Pixels of media; see :class:`framestream.pipeline.planning.dataset.Pictures`."""

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None: ...

    def read_image(self, view: MediaView, out: np.ndarray) -> None: ...

    def describe(self, view: MediaView) -> str: ...


@dataclass(slots=True)
class DecodeItem:
    """A still, or frames of a video, and the pictures of the row that they become."""

    view: MediaView
    start: int  #: first of the view's frames
    at: int  #: first picture of the row
    count: int  #: pictures
    dialogue: int  #: number of the dialogue in the row


@dataclass(slots=True, eq=False)
class DecodeTask:
    """Items of one row that one thread decodes one after the other.

    ``done`` is called once, by any thread, when every item has been decoded or has failed; ``stuck`` says that a thread
    that was given up may still write to ``pictures``.
    """

    items: list[DecodeItem]
    media_reader: np.ndarray  #: uint8 (P, S, S, 3), all of the row
    buffer: Buffer | None  #: that holds them at its start; None where other processes have no part in it
    done: Callable[[DecodeTask], None]
    failed: dict[int, str] = field(default_factory=dict)  #: place in ``items`` -> one line that names the file
    error: BaseException | None = None  #: a fault of the program
    stuck: bool = False
    place: int = 0  #: of the item that is next


def split_tasks(
    items: list[DecodeItem], pictures: np.ndarray, buffer: Buffer, done: Callable[[DecodeTask], None]
) -> list[DecodeTask]:
    """Tasks of about :data:`CHUNK` pictures: long videos in parts, small media together."""
    parts = [
        DecodeItem(item.view, item.start + first, item.at + first, min(CHUNK, item.count - first), item.dialogue)
        if item.view.kind == "video"
        else item
        for item in items
        for first in range(0, item.count if item.view.kind == "video" else 1, CHUNK)
    ]
    groups: list[list[DecodeItem]] = []
    room = 0
    for part in parts:
        if part.count > room:
            groups.append([])
            room = CHUNK
        groups[-1].append(part)
        room -= part.count
    return [DecodeTask(group, pictures, buffer, done) for group in groups]


class Decoder(Protocol):
    """Who works through tasks: :class:`Threads` or :class:`framestream.pipeline.loading.decode_processes.Processes`."""

    def submit(self, task: DecodeTask) -> None: ...

    def raise_if_failed(self) -> None: ...

    def close(self) -> None: ...


class ThreadDecoder:
    """``count`` threads that work through tasks in the order they are given.

    Args:
        source: where pixels come from; used by all threads.
        limit: seconds that one item may take.
    """

    def __init__(self, source: FrameSource, count: int, limit: float) -> None:
        self._source, self._limit = source, limit
        self._tasks: queue.SimpleQueue[DecodeTask | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._at: dict[threading.Thread, tuple[DecodeTask, float]] = {}  # what a thread is at, since when; see check
        self._threads: set[threading.Thread] = set()
        for _ in range(count):
            self._start()

    def submit(self, task: DecodeTask) -> None:
        """Decode ``task``; :attr:`Task.done` tells when."""
        self._tasks.put(task)

    def raise_if_failed(self) -> None:
        """Give up threads whose item takes too long; call it about once a second."""
        now = time.monotonic()
        with self._lock:
            late = {thread: task for thread, (task, since) in self._at.items() if now - since > self._limit + GRACE}
            for thread, task in late.items():
                self._threads.discard(thread)
                del self._at[thread]
                where = self._source.describe(task.items[task.place].view)
                task.failed[task.place] = f"{where}: took longer than loader.read_timeout ({self._limit:g} s)"
                task.stuck = True
                task.place += 1
        for task in late.values():
            self._start()
            self._tasks.put(task)

    def close(self) -> None:
        """End all threads, each after the item it is at; those that are stuck are left behind."""
        with self._lock:
            threads, self._threads = self._threads, set()
        for _ in threads:
            self._tasks.put(None)
        until = time.monotonic() + self._limit + GRACE
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while (task := self._tasks.get()) is not None:
            while self._begin(me, task):
                item, failure, error = task.items[task.place], None, None
                try:
                    self._read(item, task.media_reader[item.at : item.at + item.count])
                except (OSError, ValueError) as reason:
                    failure = f"{self._source.describe(item.view)}: {' '.join(str(reason).split())}"
                except BaseException as fault:
                    error = fault
                with self._lock:
                    if me not in self._threads:
                        return
                    if failure:
                        task.failed[task.place] = failure
                    task.error = task.error or error
                    task.place += 1
            with self._lock:
                self._at.pop(me, None)
                if me not in self._threads:
                    return
            task.done(task)
            del task  # and with it the row's pictures, while this thread waits

    def _begin(self, me: threading.Thread, task: DecodeTask) -> bool:
        """Whether there is another item, which this thread is at from now on."""
        with self._lock:
            if me in self._threads and task.place < len(task.items) and not task.error:
                self._at[me] = task, time.monotonic()
                return True
        return False

    def _read(self, item: DecodeItem, out: np.ndarray) -> None:
        if item.view.kind == "video":
            self._source.read_frames(item.view, item.start, out)
        else:
            self._source.read_image(item.view, out)
