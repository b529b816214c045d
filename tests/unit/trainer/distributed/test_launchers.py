"""The variables of launchers as input: what is wrong is one line with the variable and the fix."""

from __future__ import annotations

import socket

import pytest

from framestream.trainer.distributed.launchers import (
    MIN_TORCH,
    LaunchError,
    allocator_settings,
    describe_old_torch,
    describe_runtime_error,
    process_rank,
    setup_environment,
)
from framestream.trainer.distributed.process_group import init_process_group
from tests.helpers.paths import ROOT

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "7",
}


@pytest.mark.parametrize(
    ("environment", "fault"),
    [
        (ALONE | {"RANK": "x"}, "RANK: must be a whole number from 0 to 0, not 'x'"),
        (ALONE | {"RANK": "3"}, "RANK: must be a whole number from 0 to 0, not '3'"),
        (ALONE | {"WORLD_SIZE": "0"}, "WORLD_SIZE: must be"),
        (ALONE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK: must be"),
        (ALONE | {"MASTER_PORT": "abc"}, "MASTER_PORT: must be a whole number from 1 to 65,535"),
        (ALONE | {"MASTER_PORT": "70000"}, "MASTER_PORT: must be"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS: must be"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID not"),
        (SLURM | {"SLURM_JOB_ID": "7a"}, "SLURM_JOB_ID: must be"),
        ({"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE: must be"),
    ],
)
def test_wrong_variables_are_named(environment, fault):
    with pytest.raises(LaunchError, match=fault) as caught:
        setup_environment(dict(environment))
    assert len(str(caught.value).splitlines()) == 1
    assert process_rank(environment) in (0, 3)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in (ALONE | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            LaunchError, match=f"MASTER_PORT {port}: in use by another program on 127.0.0.1; set another"
        ):
            init_process_group(1)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (
            "CUDA error: no kernel image is available for execution on the device",
            "has a GPU that this torch has no ker",
        ),
        ("The NVIDIA driver on your system is too old (found version 11040).", "has a driver that is too old for this"),
        (
            "NCCL error: ncclSystemError: System call (e.g. socket, malloc) failed",
            "cannot reach the others by NCCL; NC",
        ),
        (
            "[gloo] makeDeviceForHostname(): unsupported gloo device",
            "cannot reach the others by gloo; GLOO_SOCKET_IFNAME",
        ),
        (
            "NCCL error: ncclRemoteError: remote process exited, Connection closed by peer",
            "lost another rank (NCCL err",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`",
            "has not enough memory (CUDA error: CUB",
        ),
    ],
)
def test_what_a_gpu_or_a_network_lacks_is_one_line(reason, line):
    found = describe_runtime_error(RuntimeError(f"{reason}\nCompile with TORCH_USE_CUDA_DSA"), {"RANK": "3"})
    assert found.startswith(f"rank 3 {line}") and "\n" not in found and reason[:60] in found


def test_gpu_memory_grows_unless_the_user_says_otherwise():
    grow = "expandable_segments:True"
    assert allocator_settings({}, "2.13.0+cpu") == {"PYTORCH_ALLOC_CONF": grow}
    assert allocator_settings({}, "2.8.1") == {"PYTORCH_CUDA_ALLOC_CONF": grow}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert allocator_settings({name: "max_split_size_mb:128"}, "2.13.0") == {}


def test_a_torch_that_is_too_old_is_named():
    assert f'"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert describe_old_torch("2.13.0+cu130") == describe_old_torch("2.5.0") == ""
    assert describe_old_torch("2.4.1") == (
        "torch 2.4.1 is installed, the trainer needs 2.5 or newer; pip install 'torch>=2.5'"
    )
