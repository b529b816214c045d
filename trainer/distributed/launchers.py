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
SLURM_REQUIRED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
MAX_RANKS = 1_000_000
EXIT_PREEMPTED = 75  #: exit status of a preempted run: EX_TEMPFAIL of sysexits.h, "try again"
RESUME_HINT = "run the same command to resume from the last checkpoint"
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  #: signals that ask a run to save and exit
PORTS = (20_000, 10_000)  #: first port for srun's jobs, and number of ports; the job id selects one


MIN_TORCH = (2, 5)  #: as in pyproject.toml
#: in messages of torch, CUDA, cuBLAS and NCCL
OUT_OF_MEMORY = r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory"
#: patterns in torch's messages, and what they mean for the rank
RUNTIME_ERRORS = {
    "no kernel image is available": "has a GPU that this torch has no kernels for; install a torch for its compute "
    "capability, as https://pytorch.org/get-started lists them",
    "driver version is insufficient|driver on your system is too old": "has a driver that is too old for this torch; "
    "update the driver, or install a torch for its CUDA version",
    "ncclSystemError|unhandled system error|socketStartConnect|ncclInvalidUsage": "cannot reach the others by NCCL; "
    "NCCL_SOCKET_IFNAME names the network interface, NCCL_DEBUG=INFO shows what it tries",
    "makeDeviceForHostname|makeDeviceForInterface|Unable to find address for": "cannot reach the others by gloo; "
    "GLOO_SOCKET_IFNAME names the network interface",
}


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
        world = _number(environment, "WORLD_SIZE", 1, MAX_RANKS)
        _number(environment, "RANK", 0, world - 1)
        _number(environment, "LOCAL_RANK", 0, MAX_RANKS)
        _number(environment, "MASTER_PORT", 1, 65_535)
    elif _number(environment, "SLURM_STEP_NUM_TASKS", 1, MAX_RANKS) > 1:
        environment.update(_from_slurm(environment))
    else:
        for name, launcher in UNSUPPORTED.items():
            if _number(environment, name, 1, MAX_RANKS) > 1:
                raise LaunchError(
                    f"{launcher} started {environment[name]} processes, each of which would train alone; "
                    "start them with torchrun, deepspeed or srun"
                )
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())


def _from_slurm(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Translate srun's variables. ``MASTER_ADDR`` and ``MASTER_PORT`` keep values that are already set."""
    first, count = PORTS
    if missing := [name for name in SLURM_REQUIRED if not environment.get(name)]:
        raise LaunchError(f"SLURM_STEP_NUM_TASKS is set, {', '.join(missing)} not; start with srun or torchrun")
    # one device without a comma: Slurm shows each task its own GPU only, as device 0
    one_device = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": "0" if one_device else environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(first + _number(environment, "SLURM_JOB_ID", 0) % count),
    }


def process_rank(environment: Mapping[str, str]) -> int:
    """Return the rank of this process, also before :func:`setup_environment`; 0 without a launcher."""
    text = environment.get("RANK") or environment.get("SLURM_PROCID") or "0"
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def describe_join_error(error: Exception, environment: Mapping[str, str]) -> str:
    """Say in one line why this process could not join the others, and what helps."""
    rank, host, port = (environment.get(name, "") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    reason = " ".join(str(error).split())
    if "EADDRINUSE" in reason or "already in use" in reason:
        return f"MASTER_PORT {port}: in use by another program on {host}; set another port for all ranks"
    return f"rank {rank} cannot reach the others at {host}:{port} ({reason:.200}); check MASTER_ADDR and MASTER_PORT"


def describe_runtime_error(error: RuntimeError, environment: Mapping[str, str]) -> str:
    """Say in one line what an error of torch means that is no fault of the program; empty for other errors.

    These are a rank that is gone or took longer than ``train.timeout_minutes``, memory that does not suffice, GPUs that
    this torch cannot use, and a network that NCCL cannot use.
    """
    reason, kinds = " ".join(str(error).split()), {kind.__name__ for kind in type(error).__mro__}
    rank = environment.get("RANK", "0")
    for pattern, meaning in RUNTIME_ERRORS.items():
        if re.search(pattern, reason):
            return f"rank {rank} {meaning} ({reason:.200})"
    if "DistError" in kinds or "third_party/gloo" in reason or "Connection closed by peer" in reason:
        return f"rank {rank} lost another rank ({reason:.200}); the message of the rank that failed first says why"
    if is_out_of_memory(error):
        fix = "use more GPUs, train.offload, or fewer text.max_tokens"
        return f"rank {rank} has not enough memory ({reason:.200}); {fix}"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a device, or the host, has not enough memory."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "OutOfMemoryError" in kinds or bool(re.search(OUT_OF_MEMORY, str(error)))


def allocator_settings(environment: Mapping[str, str], torch_version: str) -> dict[str, str]:
    """Return the variable that lets segments of torch's GPU memory grow, unless the user has set its options.

    Rows have all lengths, and blocks of fixed segments do not fit the next row. torch reads it when it is imported.
    """
    if "PYTORCH_ALLOC_CONF" in environment or "PYTORCH_CUDA_ALLOC_CONF" in environment:
        return {}
    new = tuple(int(part) for part in torch_version.split(".")[:2]) >= (2, 9)
    return {"PYTORCH_ALLOC_CONF" if new else "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def describe_old_torch(torch_version: str) -> str:
    """Say in one line that torch is too old; empty if it is not."""
    if tuple(int(part) for part in torch_version.split(".")[:2]) >= MIN_TORCH:
        return ""
    wanted = ".".join(map(str, MIN_TORCH))
    return f"torch {torch_version} is installed, the trainer needs {wanted} or newer; pip install 'torch>={wanted}'"


def local_rank(environment: Mapping[str, str], devices: int) -> int:
    """Return the number of this process's GPU on its machine, which has ``devices``.

    Raises:
        LaunchError: there are fewer GPUs than processes.
    """
    local, rank = (int(environment.get(name, "0")) for name in ("LOCAL_RANK", "RANK"))
    if local >= devices:
        raise LaunchError(f"rank {rank} would use GPU {local}, here are {devices}; start as many ranks")
    return local


def _number(environment: Mapping[str, str], name: str, low: int, high: int = 2**31 - 1) -> int:
    """Return the whole number in a variable; ``low`` if it is not set."""
    text = environment.get(name, str(low))
    if not re.fullmatch("[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise LaunchError(f"{name}: must be a whole number from {low:,} to {high:,}, not {text!r:.40}; correct it")
    return int(text)


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
