"""Epoch statistics, before the epoch runs: dialogues, frames and tokens by root and entry, fill and balance of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from framestream.pipeline.planning.epoch_plan import EpochPlan
from framestream.pipeline.planning.packing import load_balance

BATCHES = 32  #: first global batches of an epoch, over which fill and balance are computed


@dataclass(frozen=True, slots=True)
class EntryStats:
    """What one entry of one root contributes to an epoch."""

    root: str
    entry: str
    dialogues: int  #: different dialogues
    num_samples: int  #: dialogues with repetitions; the following fields count these
    frames: int  #: frames of clips and tiles of images that the vision tower processes
    tokens: int
    num_label_tokens: int


@dataclass(frozen=True, slots=True)
class EpochSummary:
    """Contents of the first epoch; ``str()`` gives a table."""

    entries: list[EntryStats]
    num_excluded: int  #: selected dialogues that cannot be used, see ``Loader.left_out``
    num_dropped: int  #: samples that ``batching.order`` drops from an epoch; different ones in each epoch
    num_truncated: int  #: different dialogues that are truncated to text.max_tokens
    num_batches: int  #: global batches
    rows_per_batch: float  #: mean number of rows of a global batch, over the first global batches
    fill: float  #: mean tokens of a row divided by text.max_tokens, over the first global batches
    balance: float  #: mean over max FLOPs of row_multiple ranks in a micro-step, over the first global batches
    row_multiple: int

    def __str__(self) -> str:
        counts = [(e.dialogues, e.num_samples, e.frames, e.tokens, e.num_label_tokens) for e in self.entries]
        names = ("dialogues", "samples", "frames", "tokens", "labels")
        totals = [sum(column) for column in zip(*counts, strict=True)]
        body = [[entry.entry, *map("{:,}".format, row)] for entry, row in zip(self.entries, counts, strict=True)]
        table = [["entry", *names], *body, ["all", *map("{:,}".format, totals)]]
        if len({entry.root for entry in self.entries}) > 1:
            roots = ["root", *(entry.root for entry in self.entries), ""]
            table = [[*line, root] for line, root in zip(table, roots, strict=True)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        alignments = "<" + ">" * len(names) + "<"
        lines = []
        for line in table:
            cells = zip(line, alignments, widths, strict=False)
            lines.append("  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip())
        measured = f"first {min(self.num_batches, BATCHES)} of {self.num_batches:,} global batches"
        balance = f"balance {self.balance:.3f} over {self.row_multiple} ranks ({measured})"
        rows = f"rows: {self.rows_per_batch:.1f} per global batch, fill {self.fill:.3f}, {balance}"
        skipped = f"excluded: {self.num_excluded:,} dialogues; truncated to text.max_tokens: {self.num_truncated:,}"
        dropped = f"; batching.order drops {self.num_dropped:,} samples per epoch" if self.num_dropped else ""
        return "\n".join([*lines, rows, skipped + dropped])


def summarize_epoch(plan: EpochPlan) -> EpochSummary:
    """Summarize the first epoch of ``plan`` from lengths; no media are read."""
    dataset, manifest = plan.dataset, plan.manifest
    entries = _entry_stats(plan)
    dataset.release()
    batches = [plan.global_batch(0, step).rows for step in range(min(BATCHES, plan.num_batches))]
    members = [np.concatenate(rows) for rows in batches]
    capacity = manifest.text.max_tokens * sum(map(len, batches))
    multiple = manifest.batching.row_multiple
    balances = [load_balance([plan.costs(0, row) for row in rows], multiple) for rows in batches]
    first = dataset.for_epoch(0)
    return EpochSummary(
        entries=entries,
        num_excluded=len(plan.excluded),
        num_dropped=plan.num_dropped,
        num_truncated=len(plan.truncated),
        num_batches=plan.num_batches,
        rows_per_batch=sum(map(len, batches)) / len(batches),
        fill=sum(int(first.length[rows].sum()) for rows in members) / capacity,
        balance=float(np.mean(balances)),
        row_multiple=multiple,
    )


def _entry_stats(plan: EpochPlan) -> list[EntryStats]:
    """Count the contents of the first epoch, entry by entry."""
    dataset = plan.dataset
    numbers = np.sort(np.concatenate([plan.order(0), np.empty(0, dtype=np.int32)]))
    entries = []
    for part, start, stop in zip(dataset.parts, dataset.starts, dataset.starts[1:], strict=False):
        low, high = np.searchsorted(numbers, [start, stop])
        repeats = np.bincount(numbers[low:high] - start, minlength=stop - start)
        names = sorted(part.entry_names())
        codes = part.entry_codes(names)
        for code, name in enumerate(names):
            rows = np.flatnonzero((codes == code) & (repeats > 0))
            if not len(rows):
                continue
            times, members = repeats[rows], rows + start
            frames, tokens, labels = (
                int((values * times).sum())
                for values in (plan.num_images(members), dataset.length[members], dataset.num_label_tokens[members])
            )
            root = str(part.index.root)
            entries.append(EntryStats(root, name, len(rows), int(times.sum()), frames, tokens, labels))
    return entries
