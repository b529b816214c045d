"""Where the tasks of a build run: in processes of this machine, or on a Ray cluster.

An executor takes a job and the numbers of the tasks to run and yields counts of what was finished, as it comes. The
bytes of a task do not depend on where it ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from framestream.tools.builder.task import BuildJob, make_worker
from framestream.tools.builder.worker_pool import WorkerPool

Counts: TypeAlias = Mapping[str, int]
Executor: TypeAlias = Callable[[BuildJob, Sequence[int]], Iterator[Counts]]


def local(workers: int) -> Executor:
    """``workers`` processes of this machine."""

    def run(job: BuildJob, tasks: Sequence[int]) -> Iterator[Counts]:
        with WorkerPool(make_worker, (job,), workers) as pool:
            yield from pool.run(tasks)

    return run


def ray(address: str) -> Executor:
    """The cluster at ``address`` (empty: the one that RAY_ADDRESS names, or a new one on this machine).

    Every machine of it must see the same file system. A task runs in a process of its own beside Ray's, so that a
    decoder that crashes or hangs costs its item alone here, too; a task whose machine is lost is run again on another.

    Raises:
        BuildError: Ray is not installed, or there is no cluster at the address.
        WorkError: a task failed outside an item, or its machines were lost too often.
    """
    from framestream.tools.builder.ray_executor import check_address, run_tasks  # needs the extra `ray`

    check_address(address or os.environ.get("RAY_ADDRESS", ""))

    def run(job: BuildJob, tasks: Sequence[int]) -> Iterator[Counts]:
        return run_tasks(address, job, tasks)

    return run
