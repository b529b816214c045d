"""Predict step time, communication and MFU of the published stages on 1 to 256 GPUs. Nothing here was measured on one.

    python -m benchmarks.scale [--stages 1 2 3 4] [--gpus 1 8 32 256] [--zero-stage 3]

Counted, and checked by tests/integration/test_benchmarks.py:

- FLOPs of every part (``trainer/model/cost.py``), with the forward pass that recomputing repeats
- kernels, and bytes that kernels other than products move, of one layer at full width (``kernel_counts``)
- weights gathered and gradients reduced in a micro-step: under ZeRO-3 twice all weights, and once the learned ones
- rows, micro-steps and balance of global batches, by the project's own packing

Assumed, because there was no GPU: the makers' data sheets (``DEVICES``), the shares of them that are reached
(``Assumptions``), and the lengths of dialogues (``workload``). ``benchmarks.gpu_first`` measures the shares.

A step lasts as long as its micro-steps. Each lasts as long as the GPU computes or as the host needs to start its
kernels, whichever is longer, and the part of its communication that does not overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

import numpy as np

from benchmarks.loading.lengths import stage3
from benchmarks.model.kernel_counts import KernelCount, count_language_layer, count_tower_block
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import TOKENS_PER_TILE
from framestream.pipeline.planning.packing import costs, load_balance, pack
from framestream.trainer.model import cost
from framestream.trainer.model.memory_estimate import GIB, RowShape, estimate_memory
from framestream.trainer.monitoring.device import BF16_TFLOPS
from tests.helpers.paths import ROOT

NODE = 8  #: GPUs of a machine, joined by NVLink
BATCHES = 8  #: global batches that are packed
WEIGHT_BYTES = 2  #: of a gathered weight and of a reduced gradient, in bf16
RECOMPUTED_ATTENTION = 2.5  #: FLOPs of attention's backward pass over its forward pass, in flash kernels


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU by its maker's data sheet: memory and rates of one direction."""

    memory: float  #: GiB
    bandwidth: float  #: bytes/s of its memory
    nvlink: float  #: bytes/s to the GPUs of its machine


DEVICES = {
    "H100": DeviceSpec(80e9 / GIB, 3.35e12, 450e9),
    "H200": DeviceSpec(141e9 / GIB, 4.8e12, 450e9),
    "A100": DeviceSpec(80e9 / GIB, 2.04e12, 300e9),
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheets that are reached, and costs of the host; none of them was measured here."""

    products: float = 0.65  #: of the peak, in matrix products
    attention: float = 0.40  #: of the peak, in attention
    bandwidth: float = 0.70  #: of the memory's rate, in all other kernels
    nvlink: float = 0.70  #: of NVLink's rate, in collectives
    network: float = 0.80 * 400e9 / 8  #: bytes/s of a GPU to other machines: 80 % of a 400 Gb/s adapter for each GPU
    latency: float = 30e-6  #: seconds that a collective takes at least
    host: float = 6e-6  #: seconds of the host to start a kernel
    overlap: float = 0.80  #: of the computing that can hide communication


@dataclass(frozen=True)
class Workload:
    """Dialogues of a stage: tokens, patches of clips and patches of tiles, int64 (n,) each; learned tokens of each."""

    tokens: np.ndarray
    clip_patches: np.ndarray
    tile_patches: np.ndarray
    learned: int


def workload(manifest: Manifest, count: int) -> Workload:
    """Assume the lengths of ``count`` dialogues of a published stage: guesses, not counts of its data."""
    patches = (manifest.frames.size // manifest.model.vision_tower.patch) ** 2  # of a frame or a tile
    if manifest.stage >= 3:  # shares of videos, images and text as benchmarks/loading/lengths.py says
        lengths = stage3(count)
        return Workload(lengths.tokens, lengths.patches // 196 * patches, np.zeros(count, dtype=np.int64), 120)
    even = np.arange(count) % 2 == 0
    if manifest.stage == 1:  # a clip or one tile, and a caption of 40 tokens
        clips, tiles, text = even * 1, (~even) * 1, 40
    else:  # 8 frames, or an image of 8 tiles and an overview, and a caption of 200 tokens
        clips, tiles, text = even * 2, (~even) * 9, 230
    visual = (clips + tiles) * TOKENS_PER_TILE
    return Workload(visual + text, clips * 4 * patches, tiles * patches, text - 30 if manifest.stage > 1 else text)


# ------------------------------------------------------------------------------------------------------ what is counted


@dataclass(frozen=True)
class BatchWork:
    """What a global batch costs all ranks together.

    Attributes:
        products, attention: FLOPs, with recomputing.
        bytes: moved by the other kernels.
        useful: FLOPs that MFU counts.
        kernels: started by the host for one row.
        rows: of the global batch.
        balance: share of the ranks' time that is not spent waiting for the most expensive row.
        fullest: the longest of the packed rows.
    """

    products: float
    attention: float
    bytes: float
    useful: float
    kernels: float
    rows: float
    balance: float
    fullest: RowShape


def count_batch(manifest: Manifest, ranks: int, layers: dict[str, tuple[KernelCount, KernelCount]]) -> BatchWork:
    """Count the mean global batch of a stage on ``ranks`` ranks; its rows are a multiple of ``ranks``, too."""
    size, multiple = manifest.batching.global_batch, max(manifest.batching.row_multiple, ranks)
    work, coefficients = workload(manifest, size * BATCHES), cost.cost_coefficients(manifest)
    spent = costs(coefficients, work.clip_patches + work.tile_patches, work.tokens)
    rows, balance, fullest = 0.0, 0.0, RowShape(0, 0, 0, 0)
    clip = cost.tower_tokens(manifest)[0]
    for part in (slice(size * n, size * (n + 1)) for n in range(BATCHES)):
        packed = pack(work.tokens[part], spent[part], manifest.text.max_tokens, multiple)
        rows += len(packed) / BATCHES
        balance += load_balance([spent[part][row] for row in packed], ranks) / BATCHES
        longest = max(packed, key=lambda row: int(work.tokens[part][row].sum()))
        if (tokens := int(work.tokens[part][longest].sum())) > fullest.tokens:
            units = (int(work.clip_patches[part][longest].sum()), int(work.tile_patches[part][longest].sum()))
            fullest = RowShape(units[0] // clip, 4 * units[1] // clip, tokens, work.learned * len(longest))
    clips, tiles = work.clip_patches.sum() / clip / BATCHES, work.tile_patches.sum() / (clip / 4) / BATCHES
    tokens = work.tokens.sum() / BATCHES
    squares = float((work.tokens.astype(np.float64) ** 2).sum()) / BATCHES
    learned = work.learned * size
    products, attention = _executed_flops(manifest, clips, tiles, tokens, squares, learned)
    patches = (work.clip_patches.sum() + work.tile_patches.sum()) / BATCHES
    moved, kernels = _kernel_work(manifest, layers, tokens, patches, rows)
    useful = cost.row_flops(manifest, 0, 0, [], learned) + _useful_flops(manifest, clips, tiles, tokens, squares)
    return BatchWork(products, attention, moved, useful, kernels, rows, balance, fullest)


def _useful_flops(manifest: Manifest, clips: float, tiles: float, tokens: float, squares: float) -> float:
    """Count the FLOPs that MFU counts, without those of labelled positions alone."""
    one = [cost.row_flops(manifest, 1, 0, [], 0), cost.row_flops(manifest, 0, 1, [], 0)]
    language = cost.language_model_cost(manifest)
    return clips * one[0] + tiles * one[1] + language.token * tokens + language.pair * squares


def _executed_flops(
    manifest: Manifest, clips: float, tiles: float, tokens: float, squares: float, learned: float
) -> tuple[float, float]:
    """Count the FLOPs of products and of attention that a GPU executes: with recomputing, causal attention halved."""
    parts, train = cost.part_costs(manifest), manifest.train
    patches, spanned = cost.tower_tokens(manifest)
    tile = patches // manifest.frames.clip_frames + spanned - patches
    tower, language = parts["vision_tower"], parts["language_model"]
    passes = {"vision_tower": 1 + 2 * train.vision_tower.train}  # of 2 FLOPs for each weight
    learned_before = train.vision_tower.train or train.connector.train
    passes["language_model"] = 1 + (learned_before or train.language_model.train) + train.language_model.train
    again = {"vision_tower": train.vision_tower.train, "language_model": learned_before or train.language_model.train}
    products = parts["connector"].token * (clips + tiles) * TOKENS_PER_TILE
    products += tower.token * (1 + again["vision_tower"] / passes["vision_tower"]) * (clips * spanned + tiles * tile)
    products -= cost.pixel_gradient(manifest) * (clips * patches + tiles * patches // manifest.frames.clip_frames)
    needed = cost.language_model_cost(manifest)
    of_language = needed.token * tokens + needed.learned * learned
    products += of_language * (1 + again["language_model"] / passes["language_model"])
    forward_pairs = (tower.pair / (3 if again["vision_tower"] else 1)) * (clips * spanned**2 + tiles * tile**2)
    causal_pairs = (language.pair / (3 if again["language_model"] else 1)) / 2 * squares
    attention = forward_pairs * (1 + again["vision_tower"] * (1 + RECOMPUTED_ATTENTION))
    return products, attention + causal_pairs * (1 + again["language_model"] * (1 + RECOMPUTED_ATTENTION))


def _kernel_work(
    manifest: Manifest, layers: dict[str, tuple[KernelCount, KernelCount]], tokens: float, patches: float, rows: float
) -> tuple[float, float]:
    """Count the bytes that kernels other than products move in a global batch, and the kernels of one row."""
    train, tower = manifest.train, manifest.model.vision_tower
    groups = max(1.0, patches / rows / tower.group_tokens)
    moved = kernels = 0.0
    for name, depth, units, calls, backward in (
        ("tower", tower.depth - 1, patches, groups, train.vision_tower.train),
        ("language", manifest.model.language_model.num_hidden_layers, tokens, 1.0, True),
    ):
        there, back = layers[name]
        moved += depth * units * (there.bytes * (1 + backward) + back.bytes * backward)
        kernels += depth * calls * (there.kernels * (1 + backward) + back.kernels * backward)
    return moved, kernels


def count_collectives(manifest: Manifest) -> tuple[int, int, int]:
    """Count what one micro-step under ZeRO-3 exchanges.

    Returns:
        gathered weights, reduced gradients, and collectives: every leaf module gathers before its forward and its
        backward pass, and reduces once. Recomputing happens while weights are gathered.
    """
    counts = cost.count_parameters(manifest)
    learned = sum(counts[part] for part in counts if getattr(manifest.train, part).train)
    leaves = 3 + manifest.model.language_model.num_hidden_layers + 1  # tower, connector, embedding, layers, head
    return 2 * sum(counts.values()), learned, 3 * leaves


# ------------------------------------------------------------------------------------------------------ what is derived


@dataclass(frozen=True)
class Prediction:
    """A step on some GPUs: seconds in all, and of a rank's computing, communication and host; share of the peak."""

    step: float
    compute: float
    communication: float
    host: float
    mfu: float
    memory: float  #: GiB of a rank on its fullest row, as --dry-run estimates them


def predict(manifest: Manifest, device: str, ranks: int, batch: BatchWork, assumed: Assumptions) -> Prediction:
    """Predict the mean step of a stage on ``ranks`` GPUs of a kind."""
    spec, peak = DEVICES[device], BF16_TFLOPS[device] * 1e12
    seconds = batch.products / (peak * assumed.products) + batch.attention / (peak * assumed.attention)
    seconds += batch.bytes / (spec.bandwidth * assumed.bandwidth)
    compute = seconds / ranks / batch.balance
    micro_steps = batch.rows / ranks
    host = micro_steps * batch.kernels * assumed.host
    exchanged = _exchange_seconds(manifest, spec, ranks, micro_steps, assumed)
    busy = max(compute, host)
    step = busy + max(exchanged - assumed.overlap * busy, 0.0)
    memory = estimate_memory(manifest, batch.fullest, ranks).total / GIB
    return Prediction(step, compute, exchanged, host, batch.useful / (step * ranks * peak), memory)


def _exchange_seconds(
    manifest: Manifest, spec: DeviceSpec, ranks: int, micro_steps: float, assumed: Assumptions
) -> float:
    """Return the seconds of a step's collectives: NVLink within a machine, then an adapter for each GPU."""
    if ranks == 1:
        return 0.0
    gathered, reduced, calls = count_collectives(manifest)
    if manifest.train.zero_stage < 3:  # gradients once a step, and the updated weights once
        moved, times = 2 * reduced, 1.0
        calls = 2
    else:
        moved, times = gathered + reduced, micro_steps
    rate = min(spec.nvlink * assumed.nvlink, NODE * assumed.network if ranks > NODE else float("inf"))
    return times * (WEIGHT_BYTES * moved * (1 - 1 / ranks) / rate + calls * assumed.latency)


def predictions(
    stages: list[int], gpus: list[int], zero_stage: int
) -> list[tuple[int, int, BatchWork, dict[str, Prediction]]]:
    """Predict every stage on every number of GPUs of every kind."""
    found = []
    for stage in stages:
        manifest = load_manifest(ROOT / "manifests" / f"stage{stage}.yaml")
        manifest = dataclasses.replace(manifest, train=dataclasses.replace(manifest.train, zero_stage=zero_stage))
        model = manifest.model
        layers = {
            "tower": count_tower_block(model.vision_tower),
            "language": count_language_layer(model.language_model),
        }
        for ranks in gpus:
            batch = count_batch(manifest, ranks, layers)
            found.append(
                (stage, ranks, batch, {name: predict(manifest, name, ranks, batch, Assumptions()) for name in DEVICES})
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a table of predictions; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 32, 256])
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3)
    options = parser.parse_args(arguments)
    columns = ["stage", "GPUs", "rows a GPU", "model PFLOP", "host s"]
    columns += [f"{name} {what}" for name in DEVICES for what in ("step s", "communication s", "MFU", "GiB")]
    print(f"Predictions, not measurements. {Assumptions()}")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for stage, ranks, batch, by_device in predictions(options.stages, options.gpus, options.zero_stage):
        host = next(iter(by_device.values())).host
        cells = [str(stage), str(ranks), f"{batch.rows / ranks:.3g}", f"{batch.useful / 1e15:,.3g}", f"{host:.2g}"]
        for name, found in by_device.items():
            fits = found.memory <= DEVICES[name].memory
            shown = [f"{found.step:.3g}", f"{found.communication:.2g}", f"{found.mfu:.0%}"] if fits else ["", "", ""]
            cells += [*shown, f"{found.memory:.0f}" if fits else f"{found.memory:.0f}: too much"]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
