"""Three measurements of training: packed against padded rows, waiting for data, and the memory of the loss.

    OMP_NUM_THREADS=2 python -m benchmarks.training.packing

*Packed*: dialogues of a stage-3 epoch (``benchmarks/loading/lengths.py``), each an eighth as long. They run as packed
rows and as batches padded to their longest dialogue. Only the language model differs. Padding stands on the right, so
that causal attention needs no mask, and no frame is padded. Nothing is timed unless both give the same losses.

*Waiting*: the trainer's own command on two ranks with two loader workers each, the demo's model, 64 frames a video.

*Loss*: peak memory of the head's forward and backward pass in chunks and with all logits at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.loading.lengths import PATCHES, Lengths, stage3
from benchmarks.loading.media import write_media
from benchmarks.model.random_model import make_row
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.planning.packing import pack
from framestream.trainer.model.cost import flops_by_part
from framestream.trainer.model.lm_head import ChunkedLMHead
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.monitoring.device import process_peak
from framestream.trainer.training.loop import resolve_cost
from framestream.trainer.weights.load import random_tensor

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "manifests" / "demo" / "stage3.yaml"
SIZE = 128  #: pixels of a frame
SHORTER = 8  #: divisor of frames and tokens of dialogues, because attention costs relatively more in narrow models
LEARNED = 16  #: label tokens, at the end of a dialogue
#: the tower has 22 % of the FLOPs of 64 frames; UMT-L beside Qwen2-7B 31 % of those of 512
SMALL = ModelConfig(
    vision_tower=VisionTowerConfig(width=160, depth=3, heads=4, table_side=8),
    language_model=LanguageModelConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
    ),
)
VOCABULARY = 152_064  #: of the loss measurement
GIB = 2**30


# Packed and padded ----------------------------------------------------------------------------------------------------


def result_row(lengths: np.ndarray, patches: np.ndarray, seed: int, size: int = SIZE) -> Batch:
    """Build one row of dialogues of these lengths: random text, noise frames of ``size``, labels at the end of each.

    ``patches`` are counted at 224 pixels, as in ``benchmarks/loading/lengths.py``.
    """
    clips = [int(count) // (4 * PATCHES) for count in patches]  # four tiles of images have as many patches as a clip
    text = [max(int(length) - 64 * count, LEARNED + 2) for length, count in zip(lengths, clips, strict=True)]
    return make_row(size, clips, text, seed, LEARNED)


def padded(model: VideoLLM, batch: Batch) -> torch.Tensor:
    """Return the loss of the row's dialogues as a batch padded to the longest of them."""
    lengths = batch.lengths
    inputs = pad_sequence(model.embed(batch).split(lengths), batch_first=True)  # (D, longest, H)
    hidden = model.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    valid = torch.cat([states[:length] for states, length in zip(hidden, lengths, strict=True)])
    following = batch.label_positions + 1
    return model.language_model.lm_head(
        valid[batch.label_positions], batch.labels[following], batch.token_weight[following]
    )


def build_small() -> VideoLLM:
    """Build the model of this measurement with random weights."""
    model = VideoLLM(SMALL, SIZE, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape), 0))
    return model


def short_dialogues(count: int, seed: int) -> Lengths:
    """Return lengths of dialogues of a stage-3 epoch, an eighth of each, in complete clips."""
    lengths = stage3(count, seed)
    clips = lengths.patches // (4 * PATCHES * SHORTER)
    text = (lengths.tokens - 64 * (lengths.patches // (4 * PATCHES))) // SHORTER
    return Lengths(64 * clips + np.maximum(text, LEARNED + 2), 4 * PATCHES * clips)


def rows_of_epoch(count: int, share: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Group ``count`` dialogues into rows: packed by length and cost, or each ``share`` consecutive ones."""
    lengths = short_dialogues(count, seed)
    cost = _small_manifest().batching.cost
    flops = cost.patch * (lengths.patches / PATCHES * (SIZE // 16) ** 2) + cost.token * lengths.tokens
    packed = pack(lengths.tokens, flops + cost.pair * lengths.tokens**2.0, 32_768 // SHORTER, count // share)
    return {"packed": packed, "padded": [np.arange(first, first + share) for first in range(0, count, share)]}


def _small_manifest() -> Manifest:
    demo = load_manifest(DEMO)
    return resolve_cost(dataclasses.replace(demo, model=SMALL, frames=dataclasses.replace(demo.frames, size=SIZE)))


def compare_packing(count: int, share: int, rounds: int) -> None:
    """Print tokens a second of packed and padded rows."""
    lengths, rows = short_dialogues(count, 0), rows_of_epoch(count, share, 0)
    model = build_small()
    ways: dict[str, Callable[[Batch], torch.Tensor]] = {"packed": model, "padded": lambda batch: padded(model, batch)}
    parts = flops_by_part(_small_manifest(), frames=512 // SHORTER, text_tokens=256 // SHORTER)
    sample = result_row(lengths.tokens[:2], lengths.patches[:2], 0)
    with torch.no_grad():
        torch.testing.assert_close(model(sample), padded(model, sample), rtol=1e-4, atol=1e-4)
    print(f"{count} dialogues, {lengths.tokens.sum():,} tokens, {len(rows['packed'])} packed rows, batches of {share}")
    tower = parts["vision_tower"] / sum(parts.values())
    print(f"the vision tower is {tower:.0%} of the FLOPs of {512 // SHORTER} frames")
    seconds: dict[str, list[np.ndarray]] = {"packed": [], "padded": []}  # elapsed and processor seconds
    for _ in range(rounds):
        for name, way in ways.items():
            elapsed, tokens, positions = np.zeros(2), 0, 0
            for members in filter(len, rows[name]):
                batch = result_row(lengths.tokens[members], lengths.patches[members], int(members.sum()))
                start = _clocks()
                way(batch).backward()
                elapsed += _clocks() - start
                tokens += batch.tokens
                longest = int(batch.cu_seqlens.diff().max())
                positions += batch.tokens if name == "packed" else longest * len(members)
                model.zero_grad()
            seconds[name].append(elapsed)
            fill = tokens / positions
            print(f"  {name:<8}{tokens / elapsed[0]:>10,.0f} tokens/s, {fill:.0%} of the positions are tokens")
    ratios = [slow / fast for fast, slow in zip(seconds["packed"], seconds["padded"], strict=True)]
    for name, values in zip(("by the clock", "of processor time"), np.transpose(ratios), strict=True):
        print(f"packed / padded tokens/s {name}: {np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


def _clocks() -> np.ndarray:
    """Return elapsed and processor seconds, float64 (2,); other work on the machine affects the first."""
    return np.array([time.perf_counter(), time.process_time()])


# Waiting for data -----------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, videos: int, frames: int, steps: int) -> Path:
    """Write a root of ``videos`` videos of footage, and a manifest for the demo's model on ``frames`` of each."""
    media = write_media(folder, videos, max(frames, 64), SIZE)
    demo, own = to_dict(load_manifest(DEMO)), to_dict(media.manifest(frames, threads=1))
    demo["model"]["language_model"]["vocab_size"] = 1024  # the tokenizer of the tests has more ids than the demo's
    value = {
        **{name: own[name] for name in ("output", "shards", "data", "frames", "init_from")},
        **{name: demo[name] for name in ("stage", "model")},
        "batching": demo["batching"] | {"global_batch": 8},  # so that all steps belong to one epoch
        "text": {"tokenizer": own["text"]["tokenizer"], "max_tokens": 16384},
        "loader": {"threads": 1, "workers": 2},
        "train": demo["train"] | {"max_steps": steps, "epochs": steps, "save_every": steps},
    }
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def measure_waiting(steps: int, ranks: int = 2) -> None:
    """Print the share of the steps that the trainer's command spends waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), videos=6, frames=64, steps=steps)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*launch, "-m", "trainer", "--manifest", str(manifest)], cwd=ROOT, env=environment, capture_output=True
        )
        if done.returncode:
            raise SystemExit(done.stderr.decode()[-2000:])
        log = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8")
    first, *rest = [json.loads(line) for line in log.splitlines()]
    seconds = sum(record["seconds"] for record in rest)
    waited = sum(record["data_wait"] * record["seconds"] for record in rest)
    frames = sum(record["frames_per_s"] * record["seconds"] for record in rest) / seconds
    print(f"{ranks} ranks, 2 loader workers each: waiting for data {waited / seconds:.2%} of {len(rest)} steps")
    print("  of each step: " + ", ".join(f"{record['data_wait']:.1%}" for record in rest))
    print(f"  {frames:,.0f} frames/s; the first step, with the start of the workers: {first['data_wait']:.1%}")


# The loss's memory ----------------------------------------------------------------------------------------------------


def loss_memory(num_tokens: int, chunked: bool, vocabulary: int, width: int = 256) -> tuple[float, int]:
    """Return loss and peak bytes of forward and backward on random float32 states; call it in a new process."""
    torch.manual_seed(0)
    head = ChunkedLMHead(nn.Linear(width, vocabulary, bias=False))
    hidden = torch.randn(num_tokens, width, requires_grad=True)
    targets, weights = torch.randint(0, vocabulary, (num_tokens,)), torch.rand(num_tokens)
    head.weight.grad = torch.zeros_like(head.weight)  # it exists in training anyway
    before = process_peak()
    if chunked:
        loss = head(hidden, targets, weights)
    else:
        loss = (F.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    loss.backward()
    return loss.item(), process_peak() - before


def compare_loss(num_tokens: int, vocabulary: int) -> None:
    """Print the memory of the loss in chunks and with all logits."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        chunked, full = (pool.apply(loss_memory, (num_tokens, way, vocabulary)) for way in (True, False))
    if abs(chunked[0] - full[0]) > 1e-5 * abs(full[0]):
        raise SystemExit(f"losses differ: {chunked[0]} in chunks, {full[0]} at once")
    print(f"loss of {num_tokens:,} label tokens and a vocabulary of {vocabulary:,}, float32, forward and backward:")
    print(f"  in chunks {chunked[1] / GIB:.2f} GiB, all logits at once {full[1] / GIB:.2f} GiB")


def main() -> None:
    """Print the three measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.packing", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dialogues", type=int, default=64, help="dialogues, packed and padded")
    parser.add_argument("--share", type=int, default=4, help="dialogues of a padded batch, of a packed row on average")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of packed and padded rows, in turn")
    parser.add_argument("--steps", type=int, default=8, help="steps of the trainer's command")
    parser.add_argument("--places", type=int, default=2048, help="label tokens of the loss")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="vocabulary size of the loss")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} before")
    compare_packing(options.dialogues, options.share, options.rounds)
    measure_waiting(options.steps)
    compare_loss(options.places, options.vocabulary)
    print(f"load average {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
