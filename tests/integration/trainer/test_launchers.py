"""Every launcher of docs/training.md starts the same run. Other launchers are refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framestream.pipeline.utils.locks import lock_folder
from framestream.trainer.distributed.launchers import (
    RESUME_HINT,
    LaunchError,
    first_host,
    process_rank,
    setup_environment,
)
from framestream.trainer.training.run_lock import RUN_LOCK
from tests.helpers.corpora import training_corpus as corpus

SBATCH = corpus.PROJECT / "manifests" / "slurm" / "train.sbatch"
SLURM = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "4711"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def first(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The first step of a single process."""
    run = tmp_path_factory.mktemp("single")
    corpus.run_here(*trainer(manifest, run))
    return corpus.log(run)[0]


def trainer(manifest: Path, run: Path) -> list[str]:
    sets = [f"output={run}", "train.max_steps=1"]
    return ["-m", "trainer", "--manifest", str(manifest), *(word for one in sets for word in ("--set", one))]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(commands: list[list[str]], environments: list[dict[str, str]]) -> list[subprocess.CompletedProcess]:
    """Run commands side by side to their ends."""
    processes = [
        subprocess.Popen(
            command,
            env={**corpus.environment(), **more},
            cwd=corpus.PROJECT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command, more in zip(commands, environments, strict=True)
    ]
    texts = [process.communicate(timeout=280) for process in processes]
    return [subprocess.CompletedProcess(p.args, p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def torchrun(manifest: Path, run: Path, folder: Path) -> tuple[list, list]:
    """Two machines, each with its torchrun."""
    port = free_port()
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "1"]
    command = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meeting, *trainer(manifest, run)]
    return [command, command], [{}, {}]


def deepspeed(manifest: Path, run: Path, folder: Path) -> tuple[list, list]:
    """A hostfile of two machines, on each of which the launcher is started."""
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    where = ["--hostfile", str(folder / "hostfile"), "--no_ssh", "--master_addr", "localhost"]
    where += ["--master_port", free_port(), "--module", *trainer(manifest, run)[1:]]
    return [["deepspeed", "--node_rank", str(rank), *where] for rank in (0, 1)], [{}, {}]


def srun(manifest: Path, run: Path, folder: Path) -> tuple[list, list]:
    """A task for each rank, with the variables that srun gives it."""
    tasks = [{**SLURM, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "MASTER_PORT": free_port()} for n in (0, 1)]
    tasks[1]["MASTER_PORT"] = tasks[0]["MASTER_PORT"]
    return [[sys.executable, *trainer(manifest, run)]] * 2, tasks


@pytest.mark.parametrize("launcher", [torchrun, deepspeed, srun])
def test_two_machines_take_the_step_of_one(manifest: Path, first: dict, tmp_path: Path, launcher) -> None:
    run = tmp_path / "run"
    for done in together(*launcher(manifest, run, tmp_path)):
        assert not done.returncode, done.stderr[-3000:]
    (step,) = corpus.log(run)
    assert (step["ranks"], first["ranks"]) == (2, 1)
    assert step["batch"] == first["batch"] and step["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert step["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    assert not list(run.glob(".seen-*"))


def test_ranks_that_differ_are_named(manifest: Path, tmp_path: Path) -> None:
    """One rank has another manifest, and its run folder is not the first rank's."""
    commands, environments = srun(manifest, tmp_path / "run", tmp_path)
    commands = [commands[0], [*commands[1], "--set", "seed=5", "--set", f"output={tmp_path / 'other'}"]]
    waits = (
        "from framestream.trainer.training import preflight; from framestream.trainer.__main__ import main; "
        "preflight.MARKER_TIMEOUT = 0.5; raise SystemExit(main())"
    )
    commands = [[sys.executable, "-c", waits, *command[3:]] for command in commands]
    done = together(commands, environments)
    assert [one.returncode for one in done] == [2, 2]
    faults = [line for one in done for line in one.stderr.splitlines() if line.startswith("error: ")]
    assert len(faults) == 3 and all(fault.startswith("error: rank 1: ") for fault in faults)
    assert f"output (rank 0: '{tmp_path / 'run'}', here: '{tmp_path / 'other'}')" in faults[0]
    assert "seed (rank 0: 0, here: 5)" in faults[1] and "is not the folder that rank 0 sees" in faults[2]


# names as `scontrol show hostnames` of Slurm 23 lists them first
@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],big1", "gpu07"),
        ("gpu[3,5-8]", "gpu3"),
        ("rack-a[1-2].site", "rack-a1.site"),
        ("a[1-2],b[3-4]", "a1"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_srun_sets_rank_and_address() -> None:
    task = {**SLURM, "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    assert process_rank(task) == 9
    setup_environment(task)
    expected = {"RANK": "9", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24711"}
    assert task.items() >= expected.items()
    alone = {**task, "CUDA_VISIBLE_DEVICES": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    del alone["RANK"]
    setup_environment(alone)
    assert (alone["LOCAL_RANK"], alone["MASTER_ADDR"], alone["MASTER_PORT"]) == ("0", "10.0.0.1", "5")


def test_one_task_and_no_launcher_are_one_process() -> None:
    assert process_rank({}) == 0
    for environment in ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        setup_environment(environment)
        assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT not"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun started 8 processes, each of which would train alone"),
    ],
)
def test_incomplete_and_unsupported_launchers_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        setup_environment(environment)


@pytest.mark.parametrize(("ended", "status", "requeued"), [(0, 0, False), (1, 1, False), (75, 0, True)])
def test_the_slurm_job_queues_itself_again(tmp_path: Path, ended: int, status: int, requeued: bool) -> None:
    """srun and scontrol are stand-ins that note their arguments; Slurm itself is not here."""
    for name, result in (("srun", ended), ("scontrol", 0)):
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/{name}.said\nexit {result}\n')
        stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "12"}
    done = subprocess.run(["bash", SBATCH, "--manifest", "a b.yaml"], env=environment, timeout=60)
    assert done.returncode == status
    said = (tmp_path / "srun.said").read_text()
    assert "--cpus-per-task=12" in said and said.endswith("python -m trainer --manifest a b.yaml\n")
    assert (tmp_path / "scontrol.said").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.said").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_during_start_has_the_same_status(tmp_path, number):
    """The process has read its manifest and still imports, or is a little later. Its status is always 75."""
    manifest = corpus.PROJECT / "manifests" / "demo" / "stage1.yaml"
    command = [sys.executable, "-X", "importtime", "-m", "trainer", "--manifest", str(manifest)]
    process = subprocess.Popen(
        command, env=corpus.environment(), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    for line in process.stderr:
        if line.rstrip().endswith("framestream.pipeline.loading.loader"):  # imported once the manifest is read
            break
    process.send_signal(number)
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 75
    assert f"stopped by {number.name}" in errors


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_wait_for_another_one_can_be_stopped(tmp_path: Path, rank: str) -> None:
    """The other rank never starts. The waits are in native code, which no signal handler of Python interrupts."""
    manifest = corpus.PROJECT / "manifests" / "demo" / "stage1.yaml"
    announce = (
        "import sys; from framestream.trainer.training import loop; from framestream.trainer.__main__ import main\n"
        "join = loop.init_process_group\n"
        "loop.init_process_group = lambda minutes: (print('waits', flush=True), join(minutes))[1]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", announce, "--manifest", str(manifest), "--set", f"output={tmp_path / 'run'}"]
    launcher = {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment = {**corpus.environment(), **launcher}
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT] if rank == "1" else [signal.SIGTERM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, cwd=corpus.PROJECT, text=True, **pipes) for _ in numbers]
    for process in processes:
        assert process.stdout.readline() == "waits\n"
    time.sleep(1.5)  # from the line to the wait
    for process, number in zip(processes, numbers, strict=True):
        process.send_signal(number)
    for process, number in zip(processes, numbers, strict=True):
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if number == signal.SIGINT else 75), errors
        line = "stopped" if number == signal.SIGINT else f"stopped by {number.name}"
        assert errors.splitlines()[-1] == f"{line}; {RESUME_HINT}" and "Traceback" not in errors


def test_a_second_run_in_the_same_folder_is_refused(manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lock_folder(run, RUN_LOCK, "run"):
        done = corpus.run_here(*trainer(manifest, run), check=False)
        assert [path.name for path in run.iterdir()] == [RUN_LOCK]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: output: {run}: another run is running here (process {os.getpid()} on ")
    assert done.returncode == 2 and "Traceback" not in done.stderr
