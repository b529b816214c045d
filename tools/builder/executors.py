"""Executors run the tasks of a build: in processes of this machine, or on a Ray cluster.

An executor takes a job and the numbers of its tasks. It yields counts of what was finished, as workers report them. The
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
    """Run tasks in ``workers`` processes of this machine."""

    def run(job: BuildJob, tasks: Sequence[int]) -> Iterator[Counts]:
        with WorkerPool(make_worker, (job,), workers) as pool:
            yield from pool.run(tasks)

    return run


def ray(address: str) -> Executor:
    """Run tasks on the cluster at ``address`` (empty: the one in RAY_ADDRESS, or a new one on this machine).

    All its machines must share one file system. A task runs in its own process beside Ray's, so a decoder that crashes
    or hangs loses only its item. A task whose machine is lost runs again on another.

    Raises:
        BuildError: Ray is not installed, or there is no cluster at the address.
        WorkerError: a task failed outside any item, or lost its machine too often.
    """
    from framestream.tools.builder.ray_executor import check_address, run_tasks  # needs the extra "ray"

    check_address(address or os.environ.get("RAY_ADDRESS", ""))

    def run(job: BuildJob, tasks: Sequence[int]) -> Iterator[Counts]:
        return run_tasks(address, job, tasks)

    return run
