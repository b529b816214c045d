"""Decode in threads, with a time limit for every item. Also the interfaces that all decoders share.

A task is a list of items: media, or parts of them, that one thread decodes one after the other into the pixels of a
row. An item that cannot be read, or takes too long, fails alone. A thread that is stuck in a read cannot be stopped.
It is given up, another thread replaces it, and its later results are ignored. Before a thread reads an item it requests
the bytes of those that follow, so that more of them are on their way than there are threads.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from framestream.pipeline.loading.buffer_pool import Buffer
from framestream.pipeline.shards.media_view import MediaView

#: Seconds beyond ``loader.read_timeout``. A storage with that limit needs them to report what it waited for.
GRACE = 2.0
IMAGES_PER_TASK = 32  #: frames and tiles of a task, unless one image has more tiles


class LoaderError(RuntimeError):
    """Reading cannot continue; one line that says why."""


class FrameSource(Protocol):
    """Reads the pixels of media by view; many threads use it at once.

    :class:`framestream.pipeline.shards.media_view.MediaViews` is one for the media of one shard root, and
    :class:`framestream.pipeline.planning.dataset.MediaReader` for those of all roots.
    """

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        """Decode frames ``start`` .. ``start + n`` of a video's view into ``out``, uint8 (n, S, S, 3).

        Raises:
            OSError, ValueError: the media cannot be read.
        """

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        """Decode an image into its tiles ``out``, uint8 (view.tiles, S, S, 3).

        Raises:
            OSError, ValueError: the media cannot be read.
        """

    def prefetch(self, view: MediaView, start: int, count: int) -> bool:
        """Request the bytes that one of the methods above will need soon, if that can be done without waiting.

        Returns:
            Whether it was done; False if nothing is gained, or enough is under way.
        """

    def describe(self, view: MediaView) -> str:
        """Return shard and member of a media item, for messages."""


@dataclass(slots=True)
class DecodeItem:
    """An image, or frames of a video, and where their pixels go in the row."""

    view: MediaView
    start: int  #: first of the view's frames; 0 for an image
    offset: int  #: index of the first frame or tile in the row's pixels
    count: int  #: number of frames or tiles
    dialogue: int  #: number of the dialogue in the row
    begun: bool = False  #: a thread reads it, or has


@dataclass(slots=True, eq=False)
class DecodeTask:
    """Items of one row that one thread decodes one after the other.

    ``done`` is called once, by any thread, when every item has been decoded or has failed. ``stuck`` means that a
    thread that was given up may still write to ``pixels``.
    """

    items: list[DecodeItem]
    pixels: np.ndarray  #: uint8 (P, S, S, 3), all frames and tiles of the row
    buffer: Buffer | None  #: memory that begins with ``pixels``; only :class:`ProcessDecoder` needs it
    done: Callable[[DecodeTask], None]
    failed: dict[int, str] = field(default_factory=dict)  #: index in ``items`` -> one line that names the file
    error: BaseException | None = None  #: an error that is not the media's
    stuck: bool = False
    next_item: int = 0  #: index in ``items``


def split_tasks(
    items: list[DecodeItem], pixels: np.ndarray, buffer: Buffer | None, done: Callable[[DecodeTask], None]
) -> list[DecodeTask]:
    """Group items into tasks of about :data:`IMAGES_PER_TASK` images: long videos in parts, small media together."""
    parts = []
    for item in items:
        if item.view.kind != "video":  # the tiles of an image are decoded together
            parts.append(item)
            continue
        for first in range(0, item.count, IMAGES_PER_TASK):
            count = min(IMAGES_PER_TASK, item.count - first)
            parts.append(DecodeItem(item.view, item.start + first, item.offset + first, count, item.dialogue))
    groups: list[list[DecodeItem]] = []
    room = 0
    for part in parts:
        if part.count > room:
            groups.append([])
            room = IMAGES_PER_TASK
        groups[-1].append(part)
        room -= part.count
    return [DecodeTask(group, pixels, buffer, done) for group in groups]


class Decoder(Protocol):
    """Decodes tasks in the background, in the order they are submitted.

    There are two: :class:`ThreadDecoder` and :class:`framestream.pipeline.loading.decode_processes.ProcessDecoder`.
    """

    def submit(self, task: DecodeTask) -> None:
        """Decode ``task``, then call :attr:`DecodeTask.done`."""

    def raise_if_failed(self) -> None:
        """Check for decoding that hangs or failed. Call it about once a second.

        Raises:
            LoaderError: decoding cannot continue.
        """

    def close(self) -> None:
        """Stop decoding. Tasks that are not done stay so."""


class ThreadDecoder:
    """A :class:`Decoder` of ``count`` threads.

    Args:
        source: reads the pixels; used by all threads.
        count: number of threads.
        limit: seconds that one item may take.
    """

    def __init__(self, source: FrameSource, count: int, limit: float) -> None:
        self._source, self._limit = source, limit
        self._tasks: queue.SimpleQueue[DecodeTask | None] = queue.SimpleQueue()
        # Protects what threads and raise_if_failed both change: the two below, and the results in tasks. Without it a
        # thread that was just given up could still record a result, and the next item would be skipped.
        self._lock = threading.Lock()
        self._current: dict[threading.Thread, tuple[DecodeTask, float]] = {}  # task, and when its current item began
        self._threads: set[threading.Thread] = set()  # without those that were given up
        self._ahead: deque[DecodeItem] = deque()  # in the order of the tasks, without those that were requested
        for _ in range(count):
            self._start()

    def submit(self, task: DecodeTask) -> None:
        """Decode ``task``, then call :attr:`DecodeTask.done`."""
        with self._lock:
            self._ahead.extend(task.items)
        self._tasks.put(task)

    def raise_if_failed(self) -> None:
        """Give up threads whose item takes too long. It never raises. Call it about once a second."""
        now = time.monotonic()
        with self._lock:
            limit = self._limit + GRACE
            late = {thread: task for thread, (task, since) in self._current.items() if now - since > limit}
            for thread, task in late.items():
                self._threads.discard(thread)
                del self._current[thread]
                name = self._source.describe(task.items[task.next_item].view)
                task.failed[task.next_item] = f"{name}: took longer than loader.read_timeout ({self._limit:g} s)"
                task.stuck = True
                task.next_item += 1
        for task in late.values():
            self._start()
            self._tasks.put(task)

    def close(self) -> None:
        """End all threads, each after its current item. Threads that are stuck are left behind."""
        with self._lock:
            threads, self._threads = self._threads, set()
            self._ahead.clear()
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
        thread = threading.current_thread()
        while (task := self._tasks.get()) is not None:
            while self._begin(thread, task):
                item, failure, error = task.items[task.next_item], None, None
                try:
                    self._look_ahead()
                    self._read(item, task.pixels[item.offset : item.offset + item.count])
                except (OSError, ValueError) as reason:
                    failure = f"{self._source.describe(item.view)}: {' '.join(str(reason).split())}"
                except BaseException as fault:
                    error = fault
                with self._lock:
                    if thread not in self._threads:  # given up while it read: the task is another thread's now
                        return
                    if failure:
                        task.failed[task.next_item] = failure
                    task.error = task.error or error
                    task.next_item += 1
            with self._lock:
                self._current.pop(thread, None)
                if thread not in self._threads:
                    return
            task.done(task)
            del task  # while this thread waits, it must not keep the row's pixels alive

    def _begin(self, thread: threading.Thread, task: DecodeTask) -> bool:
        """Return whether the task has another item for ``thread``, and start the clock of that item."""
        with self._lock:
            if thread in self._threads and task.next_item < len(task.items) and not task.error:
                self._current[thread] = task, time.monotonic()
                task.items[task.next_item].begun = True
                return True
        return False

    def _look_ahead(self) -> None:
        """Request the bytes of the next items, as many as the source takes. Faults are left to the readers."""
        while True:
            with self._lock:
                while self._ahead and self._ahead[0].begun:
                    self._ahead.popleft()
                if not self._ahead:
                    return
                item = self._ahead.popleft()
            is_requested = True
            with contextlib.suppress(OSError, ValueError):
                is_requested = self._source.prefetch(item.view, item.start, item.count)
            if not is_requested:
                with self._lock:
                    self._ahead.appendleft(item)
                return

    def _read(self, item: DecodeItem, out: np.ndarray) -> None:
        if item.view.kind == "video":
            self._source.read_frames(item.view, item.start, out)
        else:
            self._source.read_image(item.view, out)
