"""Read rank and world size from the environment of torchrun, deepspeed or srun.

torchrun and the deepspeed launcher set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
srun starts a task for each GPU and sets variables of its own, which are translated. Without any of these variables the
run has one process.
"""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Mapping, MutableMapping

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: variables of unsupported launchers, with the launcher's name: each of their processes would train alone
UNSUPPORTED = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "an MPI launcher"}
EXIT_PREEMPTED = 75  #: exit status of a preempted run: EX_TEMPFAIL of sysexits.h, "try again"
RESUME_HINT = "run the same command to resume from the last checkpoint"
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  #: signals that ask a run to save and exit
PORTS = (20_000, 10_000)  #: first port for srun's jobs, and number of ports; the job id selects one


class LaunchError(RuntimeError):
    """A run cannot start. ``faults``: one line each, with the fix. ``everywhere``: all ranks raise the same error."""

    def __init__(self, *faults: str, everywhere: bool = False) -> None:
        super().__init__("; ".join(faults))
        self.faults, self.everywhere = faults, everywhere


def setup_environment(environment: MutableMapping[str, str]) -> None:
    """Set those of the five variables that the launcher has not set.

    Raises:
        LaunchError: some are set and others are not, or an unsupported launcher started several processes.
    """
    if "RANK" in environment:
        if missing := [name for name in REQUIRED if name not in environment]:
            raise LaunchError(f"RANK is set, {', '.join(missing)} not; set all of them, or start with torchrun")
        environment.setdefault("LOCAL_RANK", "0")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        environment.update(_from_slurm(environment))
    else:
        for name, launcher in UNSUPPORTED.items():
            if int(environment.get(name, "1")) > 1:
                raise LaunchError(
                    f"{launcher} started {environment[name]} processes, each of which would train alone; "
                    "start them with torchrun, deepspeed or srun"
                )
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())


def _from_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Translate srun's variables. ``MASTER_ADDR`` and ``MASTER_PORT`` keep values that are already set."""
    first, count = PORTS
    # one device without a comma: Slurm shows each task its own GPU only, as device 0
    one_device = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if one_device else environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(first + int(environment["SLURM_JOB_ID"]) % count),
    }


def process_rank(environment: Mapping[str, str]) -> int:
    """Return the rank of this process, also before :func:`setup_environment`; 0 without a launcher."""
    return int(environment.get("RANK") or environment.get("SLURM_PROCID") or "0")


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``gpu07`` for ``gpu[07-09,12],big1``."""
    # a prefix, then perhaps [numbers] with the first number up to a comma, hyphen or bracket, then a suffix
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert match is not None  # every group may be empty
    prefix, number, suffix = match.groups()
    return f"{prefix}{number or ''}{suffix}"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
