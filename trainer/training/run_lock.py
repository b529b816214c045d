"""The lock of a run: one trainer at a time writes to an ``output``.

RUN/run.lock     while a run is at work; it names the process of rank 0
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from framestream.pipeline.utils.locks import LockError, LocksUnsupportedError, lock_folder
from framestream.trainer.distributed.launchers import LaunchError
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max_int

RUN_LOCK = "run.lock"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_run(run: Path, context: DistributedContext) -> Iterator[None]:
    """Lock a run's folder inside the block. Every rank calls this; rank 0 has the lock, which ends with its process.

    On a file system without locks a warning is logged.

    Raises:
        LaunchError: another run has the lock, or the folder cannot be written; on every rank.
    """
    fault = ""
    with contextlib.ExitStack() as stack:
        if context.is_main:
            try:
                stack.enter_context(lock_folder(run, RUN_LOCK, "run"))
                stack.callback((run / RUN_LOCK).unlink, missing_ok=True)
            except LocksUnsupportedError as error:
                logger.warning("output: %s; without it, make sure that no other run writes there", error)
            except LockError as error:
                fault = f"output: {error}"
        if all_reduce_max_int(int(bool(fault)), context):
            raise LaunchError(fault or "output: rank 0 cannot lock it; its message says why", everywhere=True)
        yield
