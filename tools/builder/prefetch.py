"""Fetch media files ahead of the decoder, with a few threads of a worker."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
PREFETCH_FILES = 4  #: files that are fetched, or wait, while one is decoded


def prefetch(
    items: Iterable[Item], fetch: Callable[[Item, Path], Path], scratch: Path, ahead: int = PREFETCH_FILES
) -> Iterator[tuple[Item, Future[Path]]]:
    """Yield each item with its file, in order. The file is removed when the next item is requested.

    Args:
        fetch: called in a thread with the item and an empty folder of its own below ``scratch``.
        scratch: folder to create; removed at the end.
        ahead: files that are being fetched or wait; with 1, nothing is fetched while an item is processed.
    """
    waiting: deque[tuple[Item, Path, Future[Path]]] = deque()
    remaining = enumerate(items)
    scratch.mkdir()
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="fetch")
    try:
        while True:
            while len(waiting) < ahead and (upcoming := next(remaining, None)):
                number, item = upcoming
                folder = scratch / str(number)
                folder.mkdir()
                waiting.append((item, folder, pool.submit(fetch, item, folder)))
            if not waiting:
                return
            item, folder, file = waiting.popleft()
            yield item, file
            shutil.rmtree(folder)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(scratch)
