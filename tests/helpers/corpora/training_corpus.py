"""A small real corpus, its shards and a manifest, for tests that run the real command lines."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import yaml
from PIL import Image

from framestream.trainer.monitoring.trackers import RANK_VARIABLES
from tests.helpers.emulator.build import unavailable
from tests.helpers.paths import ROOT

PROJECT = ROOT
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "white": (240, 240, 240)}


def environment() -> dict[str, str]:
    """Return the environment of a tested command: this interpreter's programs first, one thread a process, no GPU."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run(*command: str, check: bool = True, cwd: Path = PROJECT) -> subprocess.CompletedProcess:
    """Run a command to its end in ``cwd``; show its output if it fails."""
    done = subprocess.run(command, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=280)
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def run_here(*command: str, check: bool = True) -> subprocess.CompletedProcess:
    """Do the same with ``... -m MODULE ARGUMENTS`` in this process, for one rank, where a program's start takes long.

    Afterwards the process has no launcher's variables of the run, and its own handlers of signals and threads.
    """
    place = command.index("-m") + 1
    name = "trainer.__main__" if command[place] == "trainer" else command[place]
    main = importlib.import_module(f"framestream.{name}").main
    before, out, errors = _process_state(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(list(command[place + 1 :]))
    assert _process_state() == before
    if check and status:
        raise AssertionError(f"{' '.join(command)}: exit {status}\n{errors.getvalue()[-4000:]}")
    return subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())


def _process_state() -> tuple[dict[str, str | None], list[object], int, list[str]]:
    """What programs that are started later inherit, and what reacts to signals here."""
    handlers: list[object] = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    variables = {name: os.environ.get(name) for name in RANK_VARIABLES}
    return variables, handlers, wakeup, [thread.name for thread in threading.enumerate() if thread.name == "signals"]


def train_command(manifest: Path, ranks: int, *assignments: str) -> list[str]:
    """Return the command that trains ``manifest`` on ``ranks`` processes of this machine."""
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, "-m", "trainer", "--manifest", str(manifest), *sets]


def kill(process: subprocess.Popen) -> None:
    """Kill a launcher and its ranks, which have sessions of their own, and wait for their end."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (process.pid, *map(int, ranks)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()
    while any(map(_is_running, ranks)):
        time.sleep(0.01)


def _is_running(number: str) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def on_device(command: list[str]) -> list[str]:
    """Return a command of ``-m MODULE`` that runs on the stand-in device, or the same where there is no compiler."""
    if reason := unavailable():
        print(f"on the CPU: {reason}")
        return command
    place = command.index("-m") + 1
    return [*command[:place], "tests.helpers.emulator", *command[place:]]


def log(folder: Path) -> list[dict]:
    """Return the records of RUN/log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def write_video(path: Path, colour: tuple[int, int, int], seconds: int, rate: int = 4, seed: int = 0) -> None:
    """Write an H.264 clip of a colored square that moves over noise."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast"})
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for i in range(seconds * rate):
            picture = rng.integers(0, 60, (96, 96, 3), dtype=np.uint8)
            at = 8 + 2 * i % 48
            picture[24:64, at : at + 40] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))


def make(folder: Path, videos: int = 8, stage: int = 2, **over: object) -> Path:
    """Write media, annotations and a manifest to ``folder`` and build the shards; return the manifest's path."""
    media = folder / "media"
    media.mkdir(parents=True)
    names = list(COLOURS)
    samples = []
    for i in range(videos):
        colour = names[i % len(names)]
        write_video(media / f"v{i}.mp4", COLOURS[colour], seconds=4 + i % 5, seed=i)
        for question in ("Which colour is it?", "Name the colour."):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": colour}]
            samples.append(
                {"id": f"v{i}-{question[0]}", "video": f"v{i}.mp4", "conversations": turns, "family": "colour"}
            )
    for i, size in enumerate(((128, 128), (300, 140), (90, 260))):
        Image.new("RGB", size, COLOURS[names[i]]).save(media / f"s{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": names[i]}]
        samples.append({"id": f"s{i}", "image": f"s{i}.png", "conversations": turns})
    for i in range(3):
        turns = [{"from": "human", "value": f"What is {i} plus 1?"}, {"from": "gpt", "value": str(i + 1)}]
        samples.append({"id": f"t{i}", "conversations": turns})
    (folder / "all.json").write_text(json.dumps(samples))
    (folder / "val.json").write_text(json.dumps(samples[: 2 * videos]))
    manifest = {
        "stage": stage,
        "output": str(folder / "run"),
        "shards": str(folder / "shards"),
        "data": {
            "entries": [
                {"annotation": str(folder / "all.json"), "root": str(media)},
                {"annotation": str(folder / "val.json"), "root": str(media), "split": "val"},
            ]
        },
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 8, "size": 128},
        "images": {"max_grid": 2},
        "text": {"tokenizer": str(PROJECT / "tests" / "golden" / "tokens_labels" / "tokenizer"), "max_tokens": 1024},
        "batching": {"global_batch": 6, "row_multiple": 4},
        "model": {
            "vision_tower": {"width": 32, "depth": 3, "heads": 2, "table_side": 8, "group_tokens": 1024},
            "language_model": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 1024,
                "max_position_embeddings": 4096,
            },
        },
        "init_from": {"vision_tower": "random", "connector": "random", "language_model": "random"},
        "train": {
            "vision_tower": {"train": True, "lr": 1e-3},
            "connector": {"train": True, "lr": 3e-3, "weight_decay": 0.01},
            "language_model": {"train": True, "lr": 2e-3},
            "dtype": "fp32",
            "persistence_threshold": 0,
            "epochs": 3,
            "save_every": 3,
        },
        **over,
    }
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(manifest, sort_keys=False))
    run(sys.executable, "tools/build_shards.py", "--stage", str(stage), "--manifest", str(path), "--workers", "1")
    return path
