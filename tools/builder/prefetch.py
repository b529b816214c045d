"""Media files brought to this machine ahead of the decoder, by a few threads of a worker."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
AHEAD = 4  #: files that wait, or are on their way, while one is decoded


def prefetch(
    items: Iterable[Item], fetch: Callable[[Item, Path], Path], scratch: Path, ahead: int = AHEAD
) -> Iterator[tuple[Item, Future[Path]]]:
    """Each item with its file, in order; the file goes when the next item is asked for.

    Args:
        fetch: called in a thread with the item and an empty folder of its own below ``scratch``.
        scratch: removed at the end.
        ahead: files under way or waiting; with 1 nothing is under way while an item is worked on.
    """
    waiting: deque[tuple[Item, Path, Future[Path]]] = deque()
    left = enumerate(items)
    scratch.mkdir()
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="fetch")
    try:
        while True:
            while len(waiting) < ahead and (upcoming := next(left, None)):
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
