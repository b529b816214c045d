"""Per-step statistics, reduced over micro-steps and ranks.

MFU is the share of the devices' peak that the model's necessary matrix products use:

    MFU = model FLOPs of the global batch / (ranks x seconds x peak FLOP/s of a device)

The model FLOPs are those of :func:`framestream.trainer.model.cost.row_flops`. They include vision tower and connector.
They exclude recomputation and dummies, and count causal attention as the half that is needed.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import astuple, dataclass

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.distributed.process_group import DistributedContext, all_gather
from framestream.trainer.model.cost import row_flops
from framestream.trainer.monitoring.device import peak_flops, peak_memory


@dataclass(frozen=True)
class Sums:
    """Quantities that add up over rows and ranks, in float64."""

    tokens: float = 0.0
    frames: float = 0.0
    dialogues: float = 0.0  #: dialogues that were read
    skipped: float = 0.0  #: dialogues that could not be read
    digest: float = 0.0  #: see :func:`_digest`
    flops: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class StepStats:
    """Statistics of one global batch. Create it when the first row is requested.

    Attributes:
        loss: loss of the global batch, known after :meth:`all_reduce`.
        dialogues: dialogues of the global batch that were read, known after :meth:`all_reduce`.
    """

    def __init__(self, manifest: Manifest, context: DistributedContext) -> None:
        self._manifest, self._context = manifest, context
        self._started = self._wait_started = time.perf_counter()
        self._waited = self._memory = 0.0
        self._sums = Sums()
        self._losses: list[torch.Tensor] = []
        self._rows: list[tuple[float, list[str]]] = []  # loss and dialogue keys of this rank's rows
        self._weight = 1.0
        self.loss, self.dialogues = math.nan, 0

    def start_wait(self) -> None:
        """Start waiting: the next row is requested now."""
        self._wait_started = time.perf_counter()

    def end_wait(self) -> None:
        """End waiting: the row has arrived."""
        self._waited += time.perf_counter() - self._wait_started

    def add(self, row: Batch, loss: torch.Tensor) -> None:
        """Count a row that lies on the CPU.

        ``loss`` is a detached scalar on the device. It is not read here, so the device is not waited for.
        """
        self._sums += Sums(
            tokens=row.tokens,
            frames=row.frames,
            dialogues=len(row.keys),
            skipped=len(row.skipped),
            digest=_digest([*row.keys, *(key for key, _ in row.skipped)]),
            flops=_flops(self._manifest, row),
        )
        self._losses.append(loss)
        self._rows.append((math.nan, row.keys))
        self._weight = row.total_weight

    def all_reduce(self) -> None:
        """Add up all ranks, which have equally many rows. Every rank calls this once, after its last row."""
        device, own = self._context.device, len(self._losses)
        figures = [self._waited, float(peak_memory(device)), *astuple(self._sums)]
        # with the losses in one table, so that the host waits for the device once
        numbers = torch.tensor(figures, dtype=torch.float64).to(device, non_blocking=True)
        table = all_gather(torch.cat([torch.stack(self._losses).double(), numbers]), self._context).tolist()
        losses = table[self._context.rank][:own]
        self._rows = [(loss, keys) for loss, (_, keys) in zip(losses, self._rows, strict=True)]
        self.loss = sum(sum(row[:own]) / self._weight for row in table)
        waits, memory, *sums = zip(*(row[own:] for row in table), strict=True)
        self._waited, self._memory = max(waits), max(memory)
        self._sums = Sums(*map(sum, sums))
        self.dialogues = int(self._sums.dialogues)

    def not_finite(self) -> list[tuple[str, str]]:
        """Return (dialogue key, reason) of this rank for a global batch whose step was skipped.

        If the loss of the global batch is not finite, these are the dialogues of the rows whose loss is not finite.
        Most ranks have none. If the loss is finite, these are all dialogues, because they share the gradient.
        """
        if math.isfinite(self.loss):
            reason = "the gradient of its global batch is not finite"
            return [(key, reason) for _, keys in self._rows for key in keys]
        faulty = [(loss, keys) for loss, keys in self._rows if not math.isfinite(loss)]
        return [(key, f"the loss of its row is {loss}") for loss, keys in faulty for key in keys]

    def to_dict(self) -> dict:
        """Return the step's figures for the log. Call it when the step is complete."""
        sums, seconds = self._sums, time.perf_counter() - self._started
        rate = sums.flops / (self._context.world * seconds)
        peak = peak_flops(self._manifest.train, self._context.device)
        return {
            "loss": self.loss,
            "tokens_per_s": sums.tokens / seconds,
            "frames_per_s": sums.frames / seconds,
            "data_wait": self._waited / seconds,
            "seconds": seconds,
            "tflops": rate / 1e12,
            "mfu": None if peak is None else rate / peak,
            "peak_memory": int(self._memory),
            "ranks": self._context.world,
            "micro_steps": len(self._rows),
            "dialogues": int(sums.dialogues),
            "skipped": int(sums.skipped),
            "batch": f"{int(sums.digest):014x}",
        }


def _flops(manifest: Manifest, row: Batch) -> float:
    if not row.keys:
        return 0.0
    return row_flops(manifest, len(row.clips), len(row.image_tiles), row.lengths, len(row.label_positions))


def _digest(keys: list[str]) -> int:
    """Return a sum over dialogue keys that identifies a global batch.

    It does not depend on the order of the dialogues or on their ranks. Each key adds 40 bits of its hash, so that the
    sum over 8,192 dialogues is still exact in float64.
    """
    return sum(int.from_bytes(hashlib.sha256(key.encode()).digest()[:5], "big") for key in keys)
