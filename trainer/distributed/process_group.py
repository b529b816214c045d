"""Start the process group, select the device, and provide the collectives of the training loop."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads this at its first import

import deepspeed  # noqa: E402
import deepspeed.comm as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

from framestream.trainer.distributed.launchers import LaunchError, describe_join_error, local_rank, setup_environment  # noqa: E402

#: the launcher's variables that a process without launcher sets, for as long as its group lasts
_own_variables: set[str] = set()


@dataclass(frozen=True)
class DistributedContext:
    """Rank, number of ranks and device of this process, and the gloo group of all ranks (``control``)."""

    rank: int
    world: int
    device: torch.device
    control: torch.distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the log and the state of checkpoints."""
        return self.rank == 0


def init_process_group(timeout_minutes: float) -> DistributedContext:
    """Join the process group and select the device. Without a launcher, the group has this process only.

    Collectives that take longer than ``timeout_minutes`` raise instead of hanging. This includes DeepSpeed's: by
    default it makes its own group of all ranks with torch's limits, 10 minutes for NCCL and 30 for gloo.

    Raises:
        LaunchError: the launcher's variables are incomplete or wrong, the port is in use, rank 0 cannot be reached, or
            there are fewer GPUs than processes.
    """
    before = set(os.environ)
    setup_environment(os.environ)
    # DeepSpeed counts CPU ranks by this, and otherwise starts the program numactl in every reduction
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    _own_variables.update(set(os.environ) - before)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at start-up, which only inference uses. This takes a
        # minute, needs a compiler, and leaves a lock behind if the process is killed, on which the next one waits.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(local_rank(os.environ, accelerator.device_count()))
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's calls
    limit = timedelta(minutes=timeout_minutes)
    backend = accelerator.communication_backend_name()
    try:
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
    except (RuntimeError, ValueError) as error:  # torch 2.5: no DistError for a port that is in use
        reason = describe_join_error(error, os.environ)
        destroy_process_group()
        raise LaunchError(reason) from None
    deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(timeout=limit)
    control = torch.distributed.new_group(backend="gloo", timeout=limit)
    return DistributedContext(
        dist.get_rank(), dist.get_world_size(), torch.device(accelerator.current_device_name()), control
    )


def destroy_process_group() -> None:
    """Leave the process group. Programs that this process starts later get no launcher's variables of it."""
    if dist.is_initialized():
        deepspeed.utils.groups._WORLD_GROUP = None
        dist.destroy_process_group()
    for name in _own_variables:
        os.environ.pop(name, None)
    _own_variables.clear()


def barrier() -> None:
    """Wait until every rank calls this."""
    dist.barrier()


def all_reduce_max_int(number: int, context: DistributedContext) -> int:
    """Return the largest of all ranks' numbers. Runs on the CPUs and does not wait for the devices."""
    tensor = torch.tensor(number)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=context.control)
    return int(tensor)


def all_reduce_sum(values: list[float], context: DistributedContext) -> list[float]:
    """Sum each value over all ranks (float64)."""
    tensor = torch.tensor(values, dtype=torch.float64, device=context.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_gather(values: torch.Tensor, context: DistributedContext) -> torch.Tensor:
    """Return the ``values`` (n,) of every rank, int64 or float64: (world, n), on the CPU."""
    table = torch.zeros(context.world, len(values), dtype=values.dtype, device=context.device)
    table[context.rank] = values.to(context.device)
    dist.all_reduce(table)
    return table.cpu()


def gather_objects(value: Any, context: DistributedContext) -> list[Any]:
    """Return every rank's value on every rank, in the order of ranks. The values are pickled."""
    if context.world == 1:
        return [value]
    values: list[Any] = [None] * context.world
    torch.distributed.all_gather_object(values, value, group=context.control)
    return values


def broadcast_object(value: Any, context: DistributedContext) -> Any:
    """Return rank 0's value on every rank."""
    if context.world == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=context.control, device=torch.device("cpu"))
    return values[0]
