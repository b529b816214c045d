"""Compare full-size training steps of stages 2, 3 and 4 on one GPU with the same steps in plain transformers.

    python -m benchmarks.model.gpu_step [--models 2b 7b] [--stages 2 3 4] [--steps 6] [--offload] [--folder DIR]

The model is UMT-L with Qwen2.5-1.5B (``2b``) or Qwen2-7B (``7b``), with random weights. Videos are real footage,
stored as shards of the stage's size and read by the stage's own loader with two worker processes.

This project's side is the command ``python -m trainer``. Its log is read, and it is killed after ``--steps``. The other
side is ``benchmarks.model.plain_step``: the same dialogues and weights, one dialogue at a time, without packing. The
table shows both losses of the first step. They differ only by rounding, which in bf16 may also change which tokens are
merged. Seconds are medians of the steps after the first two.

The number of layers is reduced where weights, gradients and moments would not leave enough memory for activations. The
table states it. With ``--offload``, this project's side has all layers and its optimizer in host memory, and the plain
side does not run. MFU is defined in docs/training.md. Both sides are divided by the same FLOPs, those that the model
needs: without padding, causal attention halved, recomputation not counted.

Without a GPU, or with ``--cpu``, sizes are small. That shows that the benchmark runs and says nothing about GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from benchmarks.loading.media import write_media
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.trainer.model import cost
from framestream.trainer.monitoring.device import peak_flops

MANIFESTS = Path(__file__).parents[2] / "manifests"
MODELS = {"2b": MANIFESTS / "2b" / "stage1.yaml", "7b": MANIFESTS / "stage1.yaml"}  #: their language models
FRAMES = {2: {4: 8, 8: 8}, 3: {64: 6, 128: 4, 512: 2}, 4: {64: 6, 128: 4, 512: 2}}  #: stage -> frames -> videos
SMALL_FRAMES = {2: {4: 4, 8: 4}, 3: {8: 3, 32: 1}, 4: {8: 3, 32: 1}}  #: stage -> frames -> videos of the CPU preset
WARMUP = 2  #: first steps that are not counted
COPIES = 100  #: of the dialogues, one global batch each, so that no step is the last (it saves) or starts an epoch
SHARE = 0.6  #: of GPU memory for weights, gradients and moments; the rest is for activations
STATE_BYTES = 16  #: of a trained weight on the plain side: weight, gradient and two moments in float32
GIB = 1024**3


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    manifest: Manifest
    plain: bool  #: whether the plain side runs too


def make_case(model: str, stage: int, folder: Path, small: bool, offload: bool) -> Case:
    """Return the stage with random weights, and write its media below ``folder`` unless they exist."""
    base = load_manifest(MANIFESTS / ("demo" if small else "") / f"stage{stage}.yaml")
    language = base.model.language_model if small else load_manifest(MODELS[model]).model.language_model
    counts = (SMALL_FRAMES if small else FRAMES)[stage]
    value = {
        "stage": stage,
        "output": str(folder / "run"),
        "data": {"entries": [{"annotation": "footage.json"}]},
        "mix": [{"root": root, "repeat": COPIES} for root in media_roots(folder, counts, base.frames.size)],
        "frames": {**to_dict(base.frames), "min": min(counts), "max": max(counts)},
        "text": {**to_dict(base.text), "tokenizer": str(MANIFESTS.parent / "tests/golden/tokens_labels/tokenizer")},
        "batching": {"global_batch": sum(counts.values()), "row_multiple": 1, "order": "sequential"},
        "loader": {"threads": 2, "workers": 2, "prefetch_mb": 2048},
        "model": {
            **to_dict(base.model),
            "language_model": to_dict(dataclasses.replace(language, vocab_size=max(language.vocab_size, 1024))),
        },
        "init_from": {"vision_tower": "random", "connector": "random", "language_model": "random"},
        "train": {**to_dict(base.train), "epochs": 1, "max_steps": None, "save_every": 10**9, "zero_stage": 3},
    }
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    manifest = load_manifest(path)
    if offload:
        train = dataclasses.replace(manifest.train, offload="optimizer")
        manifest, name = dataclasses.replace(manifest, train=train), "optimizer offloaded"
    else:
        manifest = manifest if small else fewer_layers(manifest, torch.cuda.get_device_properties(0).total_memory)
        name = f"{manifest.model.language_model.num_hidden_layers} of {language.num_hidden_layers} layers"
    path.write_text(yaml.safe_dump(to_dict(manifest), sort_keys=False), encoding="utf-8")
    return Case(f"{'small' if small else model}, {name}", manifest, not offload)


def media_roots(folder: Path, counts: dict[int, int], size: int) -> list[str]:
    """Write shard roots with ``counts`` (frames -> videos) of ``size`` pixels and return them; all frames are used."""
    roots = []
    for frames, videos in counts.items():
        media = folder.parent / f"media-{size}-{frames}-{videos}"
        roots.append(str(media / "shards1" / "stage3"))
        if not media.exists():
            write_media(media, videos, frames, size)
    return roots


def fewer_layers(manifest: Manifest, memory: int) -> Manifest:
    """Halve the number of the language model's layers until the plain side's states fit."""
    while state_bytes(manifest) > SHARE * memory:
        language = manifest.model.language_model
        language = dataclasses.replace(language, num_hidden_layers=language.num_hidden_layers // 2)
        manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, language_model=language))
    return manifest


def state_bytes(manifest: Manifest) -> int:
    """Return the bytes of weights, gradients and moments on the plain side; frozen weights are float32 too."""
    counts = cost.count_parameters(manifest)
    return sum(n * (STATE_BYTES if getattr(manifest.train, part).train else 4) for part, n in counts.items())


def run_trainer(path: Path, steps: int) -> list[dict]:
    """Run ``python -m trainer`` and return the log records of the first ``steps`` steps."""
    log = path.parent / "run" / "log.jsonl"
    with open(path.parent / "trainer.err", "w+", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "trainer", "--manifest", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            while len(records := _complete_lines(log)) < steps:
                if process.poll() is not None:
                    errors.seek(0)
                    raise SystemExit(f"the trainer ended with status {process.returncode}:\n{errors.read()[-2000:]}")
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return records[:steps]


def _complete_lines(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run_plain(path: Path, steps: int) -> list[dict]:
    """Run the same steps on the plain side and return their records; return an empty list if memory is too small."""
    command = [sys.executable, "-m", "benchmarks.model.plain_step", str(path), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" not in done.stderr:
        raise SystemExit(f"the plain side ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return [] if done.returncode else [json.loads(line) for line in done.stdout.splitlines()]


def table_row(stage: int, case: Case, records: list[dict], others: list[dict], peak: float | None) -> str:
    """Return a line of the table."""
    counted, last = records[WARMUP:], records[-1]
    seconds = statistics.median(r["seconds"] for r in counted)
    tokens, work = last["tokens_per_s"] * last["seconds"], last["tflops"] * last["seconds"] * 1e12
    wait = statistics.median(r["data_wait"] for r in counted)
    memory = max(r["peak_memory"] for r in records) / GIB
    cells = [str(stage), case.name, f"{tokens:,.0f}", f"{seconds:.2f}", f"{tokens / seconds:,.0f}"]
    cells += [_mfu(work, seconds, peak), f"{wait:.1%}", f"{memory:.1f}", f"{records[0]['loss']:.4f}"]
    if others:
        plain_seconds = statistics.median(r["seconds"] for r in others[WARMUP:])
        memory = max(r["peak_memory"] for r in others) / GIB
        cells += [f"{plain_seconds:.2f}", _mfu(work, plain_seconds, peak), f"{memory:.1f}", f"{others[0]['loss']:.4f}"]
        cells.append(f"{plain_seconds / seconds:.2f}")
    else:
        cells += ["out of memory" if case.plain else "not run", "", "", "", ""]
    return f"| {' | '.join(cells)} |"


def _mfu(work: float, seconds: float, peak: float | None) -> str:
    return f"{work / seconds / 1e12:,.3g} TFLOP/s" if peak is None else f"{work / seconds / peak:.1%}"


COLUMNS = (
    *("stage", "model", "tokens a step", "seconds", "tokens/s", "MFU", "data wait", "peak GiB", "first loss"),
    *("plain: seconds", "MFU", "peak GiB", "first loss", "times as long"),
)


def main(arguments: list[str] | None = None) -> None:
    """Print one row for each model and stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--stages", nargs="+", type=int, choices=list(FRAMES), default=list(FRAMES))
    parser.add_argument("--steps", type=int, default=6, help=f"the first {WARMUP} are not counted")
    parser.add_argument("--offload", action="store_true", help="all layers, with the optimizer in host memory")
    parser.add_argument("--cpu", action="store_true", help="the small preset, even with a GPU")
    parser.add_argument("--folder", type=Path, help="folder to keep media and logs in")
    options = parser.parse_args(arguments)
    if not WARMUP < options.steps < COPIES:
        parser.error(f"--steps: {WARMUP + 1} to {COPIES - 1}")
    small = options.cpu or not torch.cuda.is_available()
    if small:
        os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"] = "cpu", ""
        print(
            f"CPU preset{'' if options.cpu else ': there is no GPU here'}; its figures say nothing of a GPU", end=", "
        )
    print(f"{'CPU' if small else torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models[:1] if small else options.models:
            for stage in options.stages:
                folder = (options.folder or Path(scratch)) / f"{model}-stage{stage}{'-offload' * options.offload}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "run" / "log.jsonl").unlink(missing_ok=True)
                case = make_case(model, stage, folder, small, options.offload)
                records = run_trainer(folder / "case.yaml", options.steps)
                others = run_plain(folder / "case.yaml", options.steps) if case.plain else []
                peak = peak_flops(case.manifest.train, torch.device("cpu" if small else "cuda"))
                print(table_row(stage, case, records, others, peak), flush=True)


if __name__ == "__main__":
    main()
