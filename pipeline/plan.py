"""The plan of an epoch: which dialogues make a global batch, its rows, and what each rank runs.

Everything here is arithmetic on lengths that the index and the token cache hold: nothing is read or decoded, and
nothing depends on threads or timing. Rows do not depend on the number of ranks either; only who runs them does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.index import Index, ShardsError
from pipeline.manifest import Manifest
from pipeline.mixture import epoch_order
from pipeline.packing import costs, pack
from pipeline.tokens import Tokens


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one optimiser step."""

    rows: list[np.ndarray]  #: R int64 arrays of index rows; rank r runs row j * world size + r in micro-step j
    total_weight: float  #: loss weight of all dialogues


@dataclass(frozen=True, slots=True)
class EntryShare:
    """What one entry gives to an epoch."""

    entry: str
    dialogues: int
    frames: int  #: frames of clips and tiles of stills that go through the vision tower
    tokens: int
    learned: int  #: labelled tokens


@dataclass(frozen=True, slots=True)
class Report:
    """What an epoch contains; ``str()`` is a table."""

    entries: list[EntryShare]
    left_out: int  #: dialogues of the split that cannot be used, see ``Loader.left_out``
    dropped: int  #: usable dialogues that ``batching.order`` leaves out of an epoch, others in each
    cut: int  #: dialogues of the root that lose their end to text.max_tokens

    def __str__(self) -> str:
        names = ("entry", "dialogues", "frames", "tokens", "learned")
        body = [[e.entry, *(f"{getattr(e, name):,}" for name in names[1:])] for e in self.entries]
        sums = ["all", *(f"{sum(getattr(e, name) for e in self.entries):,}" for name in names[1:])]
        table = [names, *body, sums]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
        lines = [form.format(*line) for line in table]
        ends = f"left out: {self.left_out:,} dialogues; cut to text.max_tokens: {self.cut:,}"
        dropped = f"; batching.order drops {self.dropped:,} of all in each epoch" if self.dropped else ""
        return "\n".join([*lines, ends + dropped])


class Plan:
    """Order, rows and weights of every epoch of one split under one manifest."""

    def __init__(self, index: Index, manifest: Manifest, tokens: Tokens, split: str) -> None:
        self.index, self.manifest, self.tokens = index, manifest, tokens
        in_split = pc.equal(index.dialogues["split"], split).to_numpy()
        usable = in_split & (tokens.learned > 0)
        usable[list(tokens.refused)] = False
        self.members = np.flatnonzero(usable)
        self.left_out = np.flatnonzero(in_split & ~usable)
        if not len(self.members):
            raise ShardsError(f"{index.root}: no dialogue of split {split} can be used; {self._why()}")
        # With compat: published lengths grow with the epoch; those of the last one group the dialogues of all.
        pictures = tokens.clips[self.members] + tokens.tiles[self.members]
        self._signed = np.where(pictures > 0, 1, -1) * tokens.length[self.members].astype(np.int64)
        self._epoch, self._order = 0, self._order_of(0)
        if not len(self._order):
            raise ShardsError(
                f"{index.root}: batching.order modality_length leaves out the last global batch of either kind, and "
                f"split {split} has no others; use modality, or a smaller batching.global_batch"
            )
        side = manifest.frames.size // manifest.model.vision_tower.patch
        self._patches = side * side

    def _why(self) -> str:
        if not len(self.left_out):
            return "the manifest's data.entries name none, or all are in the build's ledger"
        first = int(self.left_out[0])
        return f"{len(self.left_out)} are left out, the first because {self.tokens.refused[first]}"

    @property
    def batches(self) -> int:
        """Global batches of an epoch; the last may be smaller than the others."""
        return -(-len(self._order) // self.manifest.batching.global_batch)

    def _order_of(self, epoch: int) -> np.ndarray:
        return epoch_order(self.members, self._signed, self.manifest.batching, self.manifest.seed, epoch)

    def units(self, rows: np.ndarray) -> int:
        """Clips and tiles of dialogues together: what goes through the vision tower one by one."""
        return int(self.tokens.clips[rows].sum() + self.tokens.tiles[rows].sum())

    def pictures(self, rows: np.ndarray) -> np.ndarray:
        """Frames and tiles of each dialogue, int64 (n,)."""
        clips = self.tokens.clips[rows].astype(np.int64)
        return clips * self.manifest.frames.clip_frames + self.tokens.tiles[rows]

    def global_batch(self, epoch: int, step: int) -> GlobalBatch:
        """Slice ``step`` of the epoch's order, as rows."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        batching, size = self.manifest.batching, self.manifest.batching.global_batch
        members = self._order[step * size : (step + 1) * size]
        tokens = self.tokens.at(epoch)
        lengths = tokens.length[members].astype(np.int64)
        flops = costs(batching.cost, self.pictures(members) * self._patches, lengths)
        packed = pack(lengths, flops, self.manifest.text.max_tokens, batching.row_multiple)
        by_token = batching.loss_weight == "token"
        weight = float(tokens.learned[members].sum()) if by_token else float(len(members))
        return GlobalBatch([members[row] for row in packed], weight)

    def weight(self, row: int, epoch: int) -> float:
        """Loss weight of each labelled place of one dialogue."""
        by_token = self.manifest.batching.loss_weight == "token"
        return 1.0 if by_token else 1.0 / float(self.tokens.at(epoch).learned[row])

    def groups(self, rows: list[np.ndarray]) -> int:
        """Tower groups of a micro-step whose ranks run ``rows``: the maximum over them, at least 1."""
        size = self.manifest.model.vision_tower.group_clips
        return max(1, *(-(-self.units(row) // size) for row in rows))

    def fingerprint(self, split: str) -> dict[str, object]:
        """Everything that decides order and contents of global batches, by name."""
        manifest, batching = self.manifest, self.manifest.batching
        cost = batching.cost
        return {
            "index": self.index.fingerprint,
            "tokens": self.tokens.fingerprint,
            "split": split,
            "seed": manifest.seed,
            "text.max_tokens": manifest.text.max_tokens,
            "text.over_length": manifest.text.over_length,
            "batching.global_batch": batching.global_batch,
            "batching.row_multiple": batching.row_multiple,
            "batching.order": batching.order,
            "batching.cost": None if cost is None else [cost.patch, cost.token, cost.pair],
            "patches of a frame": self._patches,
        }

    def report(self) -> Report:
        """What an epoch contains, by entry."""
        tokens, rows = self.tokens, self.members
        table = pa.table(
            {
                "entry": self.index.dialogues["entry"].take(pa.array(rows)),
                "frames": self.pictures(rows),
                "tokens": tokens.length[rows].astype(np.int64),
                "learned": tokens.learned[rows].astype(np.int64),
            }
        )
        sums = [(name, "sum") for name in ("frames", "tokens", "learned")]
        grouped = table.group_by("entry").aggregate([("entry", "count"), *sums]).sort_by("entry").to_pylist()
        names = ("entry", "entry_count", "frames_sum", "tokens_sum", "learned_sum")
        shares = [EntryShare(*(share[name] for name in names)) for share in grouped]
        return Report(shares, len(self.left_out), len(rows) - len(self._order), tokens.cut)
