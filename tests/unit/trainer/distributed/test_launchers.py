"""The variables of launchers as input: what is wrong is one line with the variable and the fix."""

from __future__ import annotations

import socket

import pytest

from framestream.trainer.distributed.launchers import LaunchError, process_rank, setup_environment
from framestream.trainer.distributed.process_group import init_process_group

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
