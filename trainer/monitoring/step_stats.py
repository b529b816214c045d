"""What one optimiser step amounts to, over the rows of a global batch and over ranks.

MFU is the share of the devices' peak that went into products which the model needs:

    MFU = model FLOPs of the global batch / (ranks x seconds x peak FLOP/s of a device)

with the model FLOPs of :func:`framestream.trainer.model.cost.row_flops`, which counts vision tower and connector, and counts no
recomputation, no dummies, and causal attention as the half that is needed.
"""

from __future__ import annotations

import hashlib
import math
import time

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max, all_reduce_sum
from framestream.trainer.model.cost import row_flops
from framestream.trainer.monitoring.device import peak_flops, peak_memory


class StepStats:
    """Sums of one global batch; made when its first row is asked for.

    Attributes:
        loss: of the global batch, known after :meth:`over_ranks`.
        dialogues: of the global batch that were read, known after :meth:`over_ranks`.
    """

    def __init__(self, manifest: Manifest, place: DistributedContext) -> None:
        self._manifest, self._place = manifest, place
        self._started = self._asked = time.perf_counter()
        self._waited = self._memory = 0.0
        self._sums = [0.0] * 6  # tokens, frames, dialogues, skipped, digest, FLOPs
        self._losses: list[torch.Tensor] = []
        self._rows: list[tuple[float, list[str]]] = []  # loss and dialogue keys of this rank's rows
        self._weight = 1.0
        self.loss, self.dialogues = math.nan, 0

    def end_wait(self) -> None:
        """A row is here: the time since it was asked for was spent waiting."""
        self._waited += time.perf_counter() - self._asked

    def start_wait(self) -> None:
        """The next row is asked for now."""
        self._asked = time.perf_counter()

    def add(self, row: Batch, loss: torch.Tensor) -> None:
        """Count a row, on the CPU, with its ``loss`` (a detached scalar on the device, not waited for)."""
        for i, value in enumerate(
            (
                row.tokens,
                row.frames,
                len(row.keys),
                len(row.skipped),
                _digest([*row.keys, *(key for key, _ in row.skipped)]),
                _flops(self._manifest, row),
            )
        ):
            self._sums[i] += value
        self._losses.append(loss)
        self._rows.append((math.nan, row.keys))
        self._weight = row.total_weight

    def all_reduce(self) -> None:
        """Add up all ranks; every rank calls this once, after its last row."""
        losses = torch.stack(self._losses).tolist()
        self._rows = [(loss, keys) for loss, (_, keys) in zip(losses, self._rows, strict=True)]
        self.loss, *self._sums = all_reduce_sum([sum(losses) / self._weight, *self._sums], self._place)
        self.dialogues = int(self._sums[2])
        waits = [self._waited, float(peak_memory(self._place.device))]
        self._waited, self._memory = all_reduce_max(waits, self._place)

    def not_finite(self) -> list[tuple[str, str]]:
        """(dialogue key, reason) on this rank, after a global batch that was not learned.

        Where the loss of the global batch is not finite, the dialogues of the rows whose loss is not: none on most
        ranks. Where it is finite, all dialogues, because the gradient is of all of them.
        """
        if math.isfinite(self.loss):
            why = "the gradient of its global batch is not finite"
            return [(key, why) for _, keys in self._rows for key in keys]
        faulty = [(loss, keys) for loss, keys in self._rows if not math.isfinite(loss)]
        return [(key, f"the loss of its row is {loss}") for loss, keys in faulty for key in keys]

    def to_dict(self) -> dict:
        """The step's figures for the log; called when the step is done."""
        tokens, frames, dialogues, skipped, digest, flops = self._sums
        seconds = time.perf_counter() - self._started
        rate = flops / (self._place.world * seconds)
        peak = peak_flops(self._manifest.train, self._place.device)
        return {
            "loss": self.loss,
            "tokens_per_s": tokens / seconds,
            "frames_per_s": frames / seconds,
            "data_wait": self._waited / seconds,
            "seconds": seconds,
            "tflops": rate / 1e12,
            "mfu": None if peak is None else rate / peak,
            "peak_memory": int(self._memory),
            "ranks": self._place.world,
            "micro_steps": len(self._rows),
            "dialogues": int(dialogues),
            "skipped": int(skipped),
            "batch": f"{int(digest):014x}",
        }


def _flops(manifest: Manifest, row: Batch) -> float:
    if not row.keys:
        return 0.0
    lengths = row.cu_seqlens.diff().tolist()
    learned = int((row.labels != IGNORE_INDEX).sum())
    return row_flops(manifest, len(row.clips), len(row.image_tiles), lengths, learned)


def _digest(keys: list[str]) -> int:
    """A sum over dialogue keys that identifies a global batch whatever the order and the ranks of its dialogues.

    40 bits of each key's hash: the sum over 8,192 dialogues is still exact in float64.
    """
    return sum(int.from_bytes(hashlib.sha256(key.encode()).digest()[:5], "big") for key in keys)
