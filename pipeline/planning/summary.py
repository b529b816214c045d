"""What an epoch contains, before it runs: dialogues, frames and tokens by root and entry, fill and balance of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from framestream.pipeline.planning.epoch_plan import EpochPlan
from framestream.pipeline.planning.packing import load_balance

BATCHES = 32  #: global batches, the first of the epoch, of which fill and balance are told


@dataclass(frozen=True, slots=True)
class EntryStats:
    """What one entry of one root gives to an epoch."""

    root: str
    entry: str
    dialogues: int  #: different ones
    num_samples: int  #: the same as often as they appear; all that follows counts these
    frames: int  #: frames of clips and tiles of stills that go through the vision tower
    tokens: int
    num_label_tokens: int  #: labelled tokens


@dataclass(frozen=True, slots=True)
class EpochSummary:
    """What the first epoch contains; ``str()`` is a table."""

    entries: list[EntryStats]
    num_excluded: int  #: dialogues that epochs would contain if they could be used, see ``Loader.left_out``
    dropped: int  #: appearances that ``batching.order`` leaves out of an epoch, others in each
    num_truncated: int  #: different dialogues that lose their end to text.max_tokens
    batches: int  #: global batches
    rows: float  #: of a global batch, mean over the first ones
    fill: float  #: share of text.max_tokens that rows have, over the first global batches
    balance: float  #: mean over max FLOPs of row_multiple ranks in a micro-step, over the first global batches
    row_multiple: int

    def __str__(self) -> str:
        names = ("dialogues", "appearances", "frames", "tokens", "learned")
        several = len({share.root for share in self.entries}) > 1
        body = [[share.entry, *(f"{getattr(share, name):,}" for name in names)] for share in self.entries]
        sums = ["all", *(f"{sum(getattr(share, name) for share in self.entries):,}" for name in names)]
        table = [("entry", *names), *body, sums]
        if several:
            roots = ["root", *(share.root for share in self.entries), ""]
            table = [(*line, root) for line, root in zip(table, roots, strict=True)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        sides = "<" + ">" * len(names) + "<"
        lines = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=False)).rstrip()
            for line in table
        ]
        rows = f"rows: {self.rows:.1f} a global batch, fill {self.fill:.3f}, balance {self.balance:.3f} over "
        ends = f"left out: {self.num_excluded:,} dialogues; cut to text.max_tokens: {self.num_truncated:,}"
        dropped = f"; batching.order drops {self.dropped:,} of all in each epoch" if self.dropped else ""
        shown = f"{self.row_multiple} ranks (first {min(self.batches, BATCHES)} of {self.batches:,} global batches)"
        return "\n".join([*lines, rows + shown, ends + dropped])


def summarize_epoch(plan: EpochPlan) -> EpochSummary:
    """What the first epoch of ``plan`` contains; arithmetic on lengths, no media are read."""
    corpus, manifest = plan.dataset, plan.manifest
    numbers = np.sort(np.concatenate([plan.order(0), np.empty(0, dtype=np.int32)]))
    shares = []
    for part, start, stop in zip(corpus.parts, corpus.starts, corpus.starts[1:], strict=False):
        low, high = np.searchsorted(numbers, [start, stop])
        times = np.bincount(numbers[low:high] - start, minlength=stop - start)
        names = sorted(part.entry_names())
        codes = part.entry_codes(names)
        for code, name in enumerate(names):
            rows = np.flatnonzero((codes == code) & (times > 0))
            if len(rows):
                often, there = times[rows], rows + start
                sums = [plan.num_images(there), corpus.length[there], corpus.num_label_tokens[there]]
                counts = (int((values * often).sum()) for values in sums)
                shares.append(EntryStats(str(part.index.root), name, len(rows), int(often.sum()), *counts))
    corpus.release()
    batches = [plan.global_batch(0, step).rows for step in range(min(BATCHES, plan.batches))]
    members = [np.concatenate(rows) for rows in batches]
    room = manifest.text.max_tokens * sum(map(len, batches))
    multiple = manifest.batching.row_multiple
    shares_of_time = [load_balance([plan.costs(0, row) for row in rows], multiple) for rows in batches]
    first = corpus.for_epoch(0)
    return EpochSummary(
        entries=shares,
        num_excluded=len(plan.excluded),
        dropped=plan.dropped,
        num_truncated=len(plan.truncated),
        batches=plan.batches,
        rows=sum(map(len, batches)) / len(batches),
        fill=sum(int(first.length[rows].sum()) for rows in members) / room,
        balance=float(np.mean(shares_of_time)),
        row_multiple=multiple,
    )
