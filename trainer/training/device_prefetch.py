"""Fetch the next row and copy it to the device while the device works on the row before.

    rows = DevicePrefetcher(loader_rows, loader.state_dict, device)
    for row, on_device in rows:
        ...                        # a thread fetches the next row now
    rows.state_dict()              # of the rows handed out, without the row ahead

On a GPU the thread copies a row into page-locked memory, and from there on a stream of its own. The compute stream
waits for the copy, the host does not. On the CPU both rows are the same memory.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

import torch

from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.trainer.distributed.process_group import get_accelerator

CLOSE_SECONDS = 5.0  #: how long :meth:`DevicePrefetcher.close` waits for a row that is being fetched


class FetchedRow(NamedTuple):
    """A row, its copy on the device, and the position of the loader after it."""

    row: Batch
    on_device: Batch
    copied: Any  #: event of the copy; None on the CPU
    state: dict[str, Any]


class DevicePrefetcher(Iterator[tuple[Batch, Batch]]):
    """Yield each row and its copy on ``device``. One row is fetched ahead, and does not count as handed out.

    What ``rows`` raises is raised when its turn comes, after the rows before it.

    Args:
        rows: rows on the CPU; only the thread takes them.
        position: the position after the rows taken so far, such as ``Loader.state_dict``.
        device: device of the model.
    """

    def __init__(self, rows: Iterator[Batch], position: Callable[[], dict[str, Any]], device: torch.device) -> None:
        self._rows, self._position, self._device = rows, position, device
        self._state = position()
        self._is_async = not get_accelerator().is_synchronized_device()
        self._stream = get_accelerator().Stream() if self._is_async else None
        self._copying: deque[tuple[Any, Batch]] = deque()  # event and source of copies that may still run
        self._thread = DaemonThreadPool(1)
        self._ahead: Future[FetchedRow] | None = None

    def __next__(self) -> tuple[Batch, Batch]:
        """Return the next row and its copy, and fetch the one after it."""
        fetched = (self._ahead or self._fetch_ahead()).result()
        self._ahead, self._state = self._fetch_ahead(), fetched.state
        if fetched.copied is not None:
            stream = get_accelerator().current_stream()
            stream.wait_event(fetched.copied)
            for tensor in fetched.on_device.tensors().values():
                tensor.record_stream(stream)  # its memory belongs to the stream of the copy
        return fetched.row, fetched.on_device

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the rows handed out."""
        return self._state

    def close(self) -> None:
        """Drop the row ahead and close ``rows``. A row that hangs is left behind."""
        closed = self._thread.submit(_close, self._rows)
        with contextlib.suppress(FutureTimeoutError):
            closed.result(CLOSE_SECONDS)
        self._thread.__exit__(None, None, None)
        self._ahead = None

    def _fetch_ahead(self) -> Future[FetchedRow]:
        return self._thread.submit(self._fetch, self._rows)

    def _fetch(self, rows: Iterator[Batch]) -> FetchedRow:
        """Take a row and start its copy. Runs in the thread."""
        row = next(rows)
        state = self._position()
        if not self._is_async:
            return FetchedRow(row, row.to(self._device), None, state)
        accelerator = get_accelerator()
        accelerator.set_device(self._device.index)  # of this thread
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
        pinned = row.pin_memory()
        with accelerator.stream(self._stream):
            on_device = pinned.to(self._device)
            copied = accelerator.Event()
            copied.record(self._stream)
        self._copying.append((copied, pinned))  # page-locked memory must not be reused before
        return FetchedRow(row, on_device, copied, state)


def _close(rows: Iterator[Batch]) -> None:
    if close := getattr(rows, "close", None):  # of a generator
        close()
