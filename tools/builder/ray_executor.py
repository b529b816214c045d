"""Run the tasks of a build on a Ray cluster."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import framestream
from framestream.tools.builder.task import BuildJob, make_worker
from framestream.tools.builder.worker_pool import WorkerPool
from framestream.tools.common.errors import BuildError, WorkerError

try:
    import ray
except ImportError:
    raise BuildError("--executor ray needs Ray: pip install -e '.[ray]'") from None

MAX_LOST_MACHINES = 20  #: times that one task may lose its machine
CONNECT_SECONDS = 10.0  #: seconds to wait for a connection to the cluster


def check_address(address: str) -> None:
    """Check that something listens at ``address``, because Ray itself would wait for many minutes.

    Only HOST:PORT, with or without ``ray://``, is checked. Ray accepts other forms too.

    Raises:
        BuildError: nothing listens there.
    """
    if match := re.fullmatch(r"(?:ray://)?([^/:]+):(\d{1,5})", address):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise BuildError(f"--address {address}: no Ray cluster there ({error})") from None


def run_tasks(address: str, job: BuildJob, tasks: Sequence[int]) -> Iterator[Mapping[str, int]]:
    """Run ``tasks`` on the cluster at ``address``. Yields the counts of each as it ends. See ``executors.ray``."""
    if not ray.is_initialized():
        _connect(address)
    job_reference = ray.put(job)
    waiting = [_run.remote(job_reference, task) for task in tasks]
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise WorkerError(" ".join(str(error.cause).split())) from None
            except ray.exceptions.RayError as error:
                raise WorkerError(f"the Ray cluster lost a task: {' '.join(str(error).split())[:300]}") from None
    finally:
        for task in waiting:
            ray.cancel(task)


def _connect(address: str) -> None:
    folders = [
        str(Path(framestream.__file__).resolve().parents[1]),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, folders))}}
    try:
        ray.init(address=address or None, runtime_env=environment, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BuildError(f"--address {address}: no Ray cluster there ({' '.join(str(error).split())[:200]})") from None


@ray.remote(num_cpus=1, max_retries=MAX_LOST_MACHINES)
def _run(job: BuildJob, task: int) -> dict[str, int]:
    done: Counter[str] = Counter()
    with WorkerPool(make_worker, (job,), workers=1) as pool:
        for counts in pool.run([task]):
            done.update(counts)
    return dict(done)
