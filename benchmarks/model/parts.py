"""Compare connector and vision tower with a straightforward implementation of the same arithmetic, on the CPU.

    python -m benchmarks.model.parts [--clips 128] [--tower-clips 2] [--repeats 3] [--threads CORES]

Sizes are those of manifests/stage3.yaml (UMT-L at 224 pixels, connector to Qwen2-7B), in float32, with random weights
and inputs of a fixed seed. The straightforward implementation is ``benchmarks.model.plain_parts``. Its connector runs
once clip by clip and once on all clips as a batch. Its tower runs on the clips, then on half as many images. Forward
and backward of the connector use a quarter of the clips.

Results are compared before anything is timed. Then the implementations take turns. A ratio is the time of the
straightforward implementation over this project's time in the same turn. The table has medians with the smallest and
the largest value, and the ratio of the fastest turns of both. Other work on the machine shows in the load average and
in the spread, and least in the fastest turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.model import plain_parts
from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.config.model import TOKENS_PER_CLIP, VisionTowerConfig
from framestream.trainer.model.tome import ToMeConnector, merge_units
from framestream.trainer.model.umt import UMT

MANIFEST = Path(__file__).parents[2] / "manifests" / "stage3.yaml"
TOLERANCE = 1e-4  #: absolute and relative, float32
FLIPS = 0.01  #: share of clips in which a near tie may be resolved differently
Ways = dict[str, Callable[[], torch.Tensor]]  #: name -> implementation of the same function, this project's first


def merging(heads: int, clips: torch.Tensor) -> Ways:
    """Return implementations of merging alone, clips (N, P, C) -> (N, 64, C)."""
    return {
        "framestream": lambda: merge_units(clips, clips[:0], heads),
        "clip by clip": lambda: torch.cat([plain_parts.plain_merge(c, TOKENS_PER_CLIP, heads) for c in clips.split(1)]),
        "batch": lambda: plain_parts.plain_merge(clips, TOKENS_PER_CLIP, heads),
    }


def connecting(connector: ToMeConnector, heads: int, clips: torch.Tensor) -> Ways:
    """Return implementations of the complete connector, clips (N, P, C) -> (N, 64, hidden)."""
    mlp, shape = connector.mlp, (len(clips), TOKENS_PER_CLIP, -1)
    return {
        "framestream": lambda: connector(merge_units(clips, clips[:0], heads)).view(shape),
        "clip by clip": lambda: torch.cat(
            [mlp(plain_parts.plain_merge(c, TOKENS_PER_CLIP, heads)) for c in clips.split(1)]
        ),
        "batch": lambda: mlp(plain_parts.plain_merge(clips, TOKENS_PER_CLIP, heads)),
    }


def learning(connector: ToMeConnector, heads: int, clips: torch.Tensor) -> Ways:
    """Return implementations of the connector's forward and backward pass.

    Their result is the gradient (N, P, C) of the weighted sum of outputs with respect to the patches.
    """
    weight = torch.linspace(-1, 1, connector.mlp[-1].out_features)

    def step(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        connector.zero_grad()
        clips.grad = None
        (forward() * weight).sum().backward()
        return clips.grad

    ways = connecting(connector, heads, clips.requires_grad_())
    return {name: lambda way=way: step(way) for name, way in ways.items()}


def encoding(cfg: VisionTowerConfig, size: int, clips: torch.Tensor, images: torch.Tensor) -> Ways:
    """Return implementations of the tower.

    Clips (N, 3, T, S, S) and images (M, 3, 1, S, S) -> patches of both, (tokens, C).
    """
    tower = UMT(cfg, size, clips.shape[2])
    for block in tower.blocks:
        nn.init.normal_(block.attn.q_bias)
        nn.init.normal_(block.attn.v_bias)
    plain = plain_parts.PlainTower(cfg, tower)
    return {
        "framestream": lambda: torch.cat([patches.flatten(0, 1) for patches in tower.encode_patches(clips, images)]),
        "clips, then stills": lambda: torch.cat([patches.flatten(0, 1) for patches in plain(clips, images)]),
    }


def compare(ways: Ways, flips: float = 0.0) -> None:
    """Compare the results with this project's and print how many agree.

    Args:
        ways: implementations; the first axis of their results is clips or tokens.
        flips: share of the first axis that may differ by more than rounding. Float32 sums in another order can choose
            the other one of two equally good matches.

    Raises:
        SystemExit: more results differ.
    """
    (name, way), *others = ways.items()
    ours = way()
    for other, theirs in others:
        close = torch.isclose(theirs(), ours, atol=TOLERANCE, rtol=TOLERANCE).flatten(1).all(1)
        wrong = len(close) - int(close.sum())
        if wrong > flips * len(close):
            raise SystemExit(f"{other} and {name} differ in {wrong} of {len(close)}")
        print(f"{other} and {name} agree in {len(close) - wrong} of {len(close)}")


def measure_part(title: str, ways: Ways, repeats: int) -> None:
    """Print one row for each implementation; each turn begins with another one."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    for name in names:
        row = f"{title:<35}{name:<20}{spread(seconds[name]):>24}"
        if name != names[0]:
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[names[0]], strict=True)]
            row += f"{spread(ratios):>24}{min(seconds[name]) / min(seconds[names[0]]):>10.2f}"
        print(row, flush=True)


def spread(values: list[float]) -> str:
    """Format median, smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Compare results, then print a row for each part and implementation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=128, help="clips of the connector")
    parser.add_argument("--tower-clips", type=int, default=2, help="clips of the tower, with half as many images")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    manifest = load_manifest(MANIFEST)
    cfg, frames = manifest.model.vision_tower, manifest.frames
    patches = frames.clip_frames * (frames.size // cfg.patch) ** 2
    connector = ToMeConnector(cfg.width, manifest.model.language_model.hidden_size)
    clips = torch.randn(options.clips, patches, cfg.width)
    video = torch.randn(options.tower_clips, 3, frames.clip_frames, frames.size, frames.size)
    images = torch.randn(options.tower_clips // 2, 3, 1, frames.size, frames.size)

    print(f"torch {torch.__version__}, {options.threads} threads, load average {os.getloadavg()[0]:.1f} before")
    quarter = clips[: max(len(clips) // 4, 1)].clone()
    backward = learning(connector, cfg.heads, quarter)
    tower = encoding(cfg, frames.size, video, images)
    with torch.no_grad():
        compare(connecting(connector, cfg.heads, clips), FLIPS)
        compare(tower)
    compare(backward, FLIPS)
    print(f"{'':<55}{'seconds':>24}{'times framestream':>24}{'fastest':>10}")
    with torch.no_grad():
        measure_part(f"merging, {options.clips} clips", merging(cfg.heads, clips), options.repeats)
        measure_part(f"connector, {options.clips} clips", connecting(connector, cfg.heads, clips), options.repeats)
        measure_part(f"tower, {len(video)} clips, {len(images)} stills", tower, options.repeats)
    measure_part(f"connector, {len(quarter)} clips, and backward", backward, options.repeats)
    print(f"load average {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
