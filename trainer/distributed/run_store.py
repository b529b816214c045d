"""The launcher's key-value store, and waiting for rank 0 through it.

Every rank has a connection of its own to the store at MASTER_ADDR and MASTER_PORT. A rank that waits for a key is in no
collective call, so it can wait longer than ``train.timeout_minutes``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

POLL_SECONDS = 0.5  #: between two looks at a key


class MainRankError(RuntimeError):
    """Rank 0 failed while the others waited for it. The message is its error, which rank 0 reports."""


def open_store(minutes: float) -> Store:
    """Connect to the store of this start of the run; its keys are those of no other start.

    Args:
        minutes: limit on each request.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(minutes=minutes),
    )
    return PrefixStore(f"framestream/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def main_rank_first(store: Store, name: str, rank: int) -> Iterator[None]:
    """Run the block on rank 0, and then on the others, which wait for it without a limit.

    Args:
        store: of :func:`open_store`.
        name: of the block; a run uses it once.
        rank: of this process.

    Raises:
        MainRankError: the block failed on rank 0.
        RuntimeError: the store is gone, with rank 0 or the launcher.
    """
    key = f"first/{name}"
    if rank:
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
        if fault := store.get(key).decode():
            raise MainRankError(fault)
        yield
        return
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # the store is gone: so are the other ranks
            store.set(key, " ".join(str(error).split()) or type(error).__name__)
        raise
    store.set(key, "")
