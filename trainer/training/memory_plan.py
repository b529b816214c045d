"""Compare the memory that a run needs with what its ranks have: before it starts, in its first steps, and at its end.

The need is the estimate of :mod:`framestream.trainer.model.memory_estimate` for the fullest row. ``auto`` in
``train.gradient_checkpointing`` becomes the level that fits into it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.distributed.launchers import is_out_of_memory
from framestream.trainer.distributed.process_group import DistributedContext, gather_objects
from framestream.trainer.model.memory_estimate import (
    GIB,
    GPU_CONTEXT,
    MemoryEstimate,
    RowShape,
    estimate_memory,
    fullest_row,
    state_bytes,
)

HEADROOM = 0.85  #: share of a GPU's memory that ``auto`` plans with; the rest is for fragments and what is not counted
FIRST_STEPS = 3  #: optimizer steps after which the estimate is compared with what was measured
MAX_KEYS = 3  #: dialogues of a row that an error names

logger = logging.getLogger(__name__)


class DeviceMemoryError(RuntimeError):
    """A rank's device has not enough memory. The message names the row, its size, the estimate and what helps."""


def check_memory(manifest: Manifest, world: int, local_world: int, device: int | None, host: int) -> list[str]:
    """Return a fault for what cannot fit into memory. Log a warning for what probably does not fit.

    Args:
        world: number of ranks.
        local_world: number of ranks on this machine.
        device: bytes of one GPU, None if the ranks compute on the CPU.
        host: bytes of the machine's memory.
    """
    estimate = estimate_memory(manifest, fullest_row(manifest), world, device is not None)
    offloaded = state_bytes(_with(manifest, offload="none"), world) - state_bytes(manifest, world)
    limit, where = (host // local_world, "a rank's share of this machine") if device is None else (device, "the GPU")
    faults = []
    if estimate.states > limit:
        need = f"weights, gradients and optimizer need {gib(estimate.states)} a rank, {where} has {gib(limit)}"
        faults.append(f"memory: {need}; use more ranks, a higher train.zero_stage, or train.offload")
    elif estimate.total > limit:
        need = f"about {gib(estimate.total)} a rank are needed for the fullest row, {where} has {gib(limit)}"
        logger.warning("memory: %s; fewer text.max_tokens, train.offload or more ranks help", need)
    if device is not None and offloaded * local_world > host:
        need = f"train.offload puts {gib(offloaded * local_world)} into this machine's memory, which is {gib(host)}"
        faults.append(f"memory: {need}; use more machines, or offload less")
    return faults


def resolve_recomputation(manifest: Manifest, context: DistributedContext, local_world: int) -> Manifest:
    """Return the manifest with ``train.gradient_checkpointing: auto`` replaced by a level. Every rank calls this.

    It is the level that recomputes least while the fullest row fits into the memory of every rank, or else ``all``.
    """
    own = device_bytes(context)
    limit = min(gather_objects(host_bytes() // local_world if own is None else own, context))
    if manifest.train.gradient_checkpointing != "auto":
        return manifest
    level = choose_level(manifest, context.world, int(limit * HEADROOM), own is not None)
    chosen = _with(manifest, gradient_checkpointing=level)
    need = estimate_memory(chosen, fullest_row(manifest), context.world, own is not None).total
    logger.info(
        "%s: train.gradient_checkpointing: auto is %s; the fullest row needs about %s of %s",
        *(manifest.name, level, gib(need), gib(limit)),
    )
    return chosen


def choose_level(manifest: Manifest, world: int, limit: int, gpu: bool) -> str:
    """Return the level of ``train.gradient_checkpointing`` that recomputes least within ``limit`` bytes."""
    layers = manifest.model.language_model.num_hidden_layers
    for level in ("none", "tower", *(f"layers:{count}" for count in range(1, layers))):
        chosen = _with(manifest, gradient_checkpointing=level)
        if estimate_memory(chosen, fullest_row(manifest), world, gpu).total <= limit:
            return level
    return "all"


def _with(manifest: Manifest, **train: Any) -> Manifest:
    """Return the manifest with other fields of ``train``."""
    return dataclasses.replace(manifest, train=dataclasses.replace(manifest.train, **train))


def row_shape(row: Batch) -> RowShape:
    """Return the contents of a row, as the estimate counts them."""
    return RowShape(len(row.clips), len(row.image_tiles), len(row.input_ids), len(row.label_positions))


class MemoryComparison:
    """Compare the peak memory of a run's first steps with the estimate for the rows of these steps, and log both.

    Only on a GPU: the memory of a process includes Python, libraries and pages of the shards.
    """

    def __init__(self, manifest: Manifest, context: DistributedContext) -> None:
        self._manifest, self._context = manifest, context
        self._steps = self._estimated = self._measured = 0

    def count_rows(self, rows: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the rows of this rank, and count those of the first steps."""
        for row in rows:
            if self._steps < FIRST_STEPS:
                estimate = estimate_memory(self._manifest, row_shape(row), self._context.world)
                self._estimated = max(self._estimated, estimate.total - GPU_CONTEXT)  # which torch does not count
            yield row
            del row  # the loader reuses the memory of its pixels

    def end_step(self, peak_memory: int) -> None:
        """Count a step, in which the rank that allocated most had ``peak_memory`` bytes. Every rank calls this."""
        self._steps += 1
        self._measured = max(self._measured, peak_memory)
        if self._steps != FIRST_STEPS or self._context.device.type == "cpu":
            return
        estimated = max(gather_objects(self._estimated, self._context))
        fullest = estimate_memory(self._manifest, fullest_row(self._manifest), self._context.world)
        logger.info(
            "%s: memory of the first %d steps: %s allocated, %s estimated; the fullest row needs about %s: %s",
            *(self._manifest.name, FIRST_STEPS, gib(self._measured), gib(estimated), gib(fullest.total)),
            describe_estimate(fullest),
        )


@contextlib.contextmanager
def name_memory_errors(row: Batch, phase: str, manifest: Manifest, context: DistributedContext) -> Iterator[None]:
    """Turn an error of torch about memory into one that names the row.

    Args:
        phase: what is computed, such as ``forward pass of global batch 3 of epoch 0, micro-step 1``.

    Raises:
        DeviceMemoryError: the device has not enough memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(describe_out_of_memory(row, phase, manifest, context)) from error


def describe_out_of_memory(row: Batch, phase: str, manifest: Manifest, context: DistributedContext) -> str:
    """Say in one line which row did not fit, and what helps."""
    estimate = estimate_memory(manifest, row_shape(row), context.world, context.device.type != "cpu")
    keys = ", ".join(row.keys[:MAX_KEYS]) + ", ..." * (len(row.keys) > MAX_KEYS)
    layers, level = manifest.model.language_model.num_hidden_layers, manifest.train.gradient_checkpointing
    least = manifest.train.recomputation(layers) == (True, layers)
    field, now = ("offload: optimizer", manifest.train.offload) if least else ("gradient_checkpointing: all", level)
    group = manifest.model.vision_tower.group_tokens
    smaller_group = f"lower model.vision_tower.group_tokens (now {group:,}), " if row.frames else ""
    return (
        f"rank {context.rank} has not enough memory in the {phase}: {len(row.input_ids):,} tokens and {row.frames:,} "
        f"frames of {len(row.keys)} dialogues ({keys}), {gib(estimate.total)} estimated; "
        f"{smaller_group}set train.{field} (now {now}), or fewer text.max_tokens (now {manifest.text.max_tokens:,})"
    )


def describe_estimate(estimate: MemoryEstimate) -> str:
    """Return the parts of an estimate in words."""
    return ", ".join(f"{name} {gib(size)}" for name, size in dataclasses.asdict(estimate).items())


def device_bytes(context: DistributedContext) -> int | None:
    """Return the memory of this rank's GPU, None on the CPU."""
    return torch.cuda.get_device_properties(context.device).total_memory if context.device.type == "cuda" else None


def host_bytes() -> int:
    """Return the memory of this machine, or the limit of this process's control group (cgroup 2 or 1)."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    limited = [int(text) for path in limits if path.exists() and (text := path.read_text().strip()).isdigit()]
    return min([total, *limited])


def gib(size: int) -> str:
    """Return a size in GiB, with one digit after the point."""
    return f"{size / GIB:.1f} GiB"
