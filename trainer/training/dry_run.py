"""Describe a run before it starts: the resolved manifest, parameters, tokens, memory, FLOPs and steps.

Works without shards, weights or a network. Values that need an index are ``unknown``, with the command that builds it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.config.schema import ManifestError, to_dict
from framestream.pipeline.loading.loader import build_loader
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.utils.yaml_parser import dump_yaml
from framestream.trainer.checkpoint.disk_usage import describe_disk
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.model import cost
from framestream.trainer.model.memory_estimate import estimate_memory, fullest_row
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.quantization import FULL
from framestream.trainer.monitoring.run_ledger import RunLedger
from framestream.trainer.monitoring.trackers import missing_trackers
from framestream.trainer.training.loop import resolve_cost, total_steps
from framestream.trainer.training.memory_plan import describe_estimate, gib
from framestream.trainer.training.validation import Validation


def describe(manifest: Manifest) -> str:
    """Return the text of ``--dry-run``.

    Raises:
        ManifestError: a tracker is not installed, or validation has no questions.
    """
    for fault in missing_trackers(manifest.train.trackers):
        raise ManifestError(fault)
    manifest = resolve_cost(manifest)
    sections = [
        dump_yaml(to_dict(manifest)).rstrip(),
        _parameters(manifest),
        _tokens(manifest),
        _costs(manifest),
        _plan(manifest),
    ]
    return "\n\n".join(sections)


def _parameters(manifest: Manifest) -> str:
    counts, learned = cost.count_parameters(manifest), cost.count_trained(manifest)
    lines = [f"{'parameters':<16}{'count':>16}  state"]
    for name in PARTS:
        part = getattr(manifest.train, name)
        what = f"{learned[name]:,} in adapters trained" if part.lora else "trained"
        what += f" on weights in {part.lora.load}" if part.lora and part.lora.load != FULL else ""
        state = f"{what}, lr {part.lr:g}, weight decay {part.weight_decay:g}" if part.train else "frozen"
        lines.append(f"{name:<16}{counts[name]:>16,}  {state}")
    lines.append(f"{'all':<16}{sum(counts.values()):>16,}  {sum(learned.values()):,} trained")
    return "\n".join(lines)


def _tokens(manifest: Manifest) -> str:
    frames = manifest.frames
    per_frame = TOKENS_PER_CLIP // frames.clip_frames
    least, most, tiles = 1, 1, "1 tile"
    if manifest.images.mode != "square":
        least, most = 2, manifest.images.max_grid**2 + 1
        tiles = f"{least} to {most} tiles"
    return "\n".join(
        [
            "tokens per sample (visual; text is added to it)",
            f"  video  {frames.min * per_frame:,} to {frames.max * per_frame:,}  ({frames.min} to {frames.max} frames)",
            f"  image  {least * TOKENS_PER_TILE:,} to {most * TOKENS_PER_TILE:,}  ({tiles})",
            f"  row    at most {manifest.text.max_tokens:,}",
        ]
    )


def _costs(manifest: Manifest) -> str:
    frames, text = manifest.frames.max, 256
    tera = cost.flops(manifest, frames=frames, text_tokens=text) / 1e12
    row, world = fullest_row(manifest), manifest.batching.row_multiple
    memory = estimate_memory(manifest, row, world)
    return "\n".join(
        [
            f"costs, for a sample of {frames} frames and {text} text tokens (the largest of this stage)",
            f"  FLOPs   {tera:,.4g} TFLOP a sample, {tera * manifest.batching.global_batch:,.4g} TFLOP an optimizer "
            f"step of {manifest.batching.global_batch} such samples",
            f"  memory  {gib(memory.total)} on each of {world} ranks, for {row.tokens:,} tokens and {row.clips} clips:",
            f"          {describe_estimate(memory)}",
            f"  disk    {describe_disk(manifest)}",
        ]
    )


def _plan(manifest: Manifest) -> str:
    try:
        loader = build_loader(manifest)
    except ShardsError as error:
        stated = [entry.samples for entry in manifest.data.entries if entry.split == "train"]
        known = sum(samples or 0 for samples in stated)
        hint = f"; {known:,} samples are stated for {sum(s is not None for s in stated)} of {len(stated)} entries"
        return f"steps: unknown{hint}\n  {error}"
    steps = total_steps(manifest, loader.num_batches)
    text = f"steps: {steps:,} optimizer steps, {loader.num_batches:,} global batches an epoch\n{loader.report()}"
    if not manifest.evaluate.every:
        return text
    alone, no_ledger = DistributedContext(0, 1, torch.device("cpu")), RunLedger(Path(), 0, 1)
    return f"{text}\n{Validation(manifest, loader.dataset, alone, no_ledger).describe()}"
