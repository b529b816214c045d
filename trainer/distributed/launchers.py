"""Which of how many processes this one is, whoever started it: torchrun, deepspeed, srun, or nobody.

torchrun and the deepspeed launcher set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
srun, with a task for each GPU, sets its own variables, which say the same. Without any of them it is one process.
"""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import MutableMapping

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: variables of launchers that are not understood, with their names: each of their processes would train alone
OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "an MPI launcher"}
EXIT_PREEMPTED = 75  #: exit status of a run that left when asked: EX_TEMPFAIL of sysexits.h, "try again"
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  #: which ask a run to leave
PORTS = (20_000, 10_000)  #: first port of srun's jobs, and how many: the job's number chooses one


class LaunchError(RuntimeError):
    """A run that cannot begin. ``faults``: one line each, with the fix; ``everywhere``: every rank raises the same."""

    def __init__(self, *faults: str, everywhere: bool = False) -> None:
        super().__init__("; ".join(faults))
        self.faults, self.everywhere = faults, everywhere


def setup_environment(environment: MutableMapping[str, str]) -> None:
    """Set the five variables where the launcher has not.

    Raises:
        StartError: some are set and others not, or an unknown launcher started several processes.
    """
    if "RANK" in environment:
        if missing := [name for name in NEEDED if name not in environment]:
            raise LaunchError(f"RANK is set, {', '.join(missing)} not; set all of them, or start with torchrun")
        environment.setdefault("LOCAL_RANK", "0")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        environment.update(_of_slurm(environment))
    else:
        for name, launcher in OTHERS.items():
            if int(environment.get(name, "1")) > 1:
                raise LaunchError(
                    f"{launcher} started {environment[name]} processes, each of which would train alone; "
                    "start them with torchrun, deepspeed or srun"
                )
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())


def _of_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    """What srun says of this task; ``MASTER_ADDR`` and ``MASTER_PORT`` that are set already win."""
    first, count = PORTS
    alone = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))  # each task sees its own GPU only
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if alone else environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(first + int(environment["SLURM_JOB_ID"]) % count),
    }


def first_host(nodes: str) -> str:
    """First of Slurm's list of nodes, such as ``gpu[07-09,12],big1``: ``gpu07``."""
    head, numbers, tail = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes).groups()
    return f"{head}{numbers or ''}{tail}"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
