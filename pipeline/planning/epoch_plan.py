"""The plan of an epoch: which dialogues make a global batch, its rows, and what each rank runs.

Everything here is arithmetic on lengths that the index and the token cache hold: nothing is read or decoded, and
nothing depends on threads or timing. Rows do not depend on the number of ranks either; only who runs them does.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from framestream.pipeline.config.data import MixRootConfig
from framestream.pipeline.config.manifest import Manifest, ManifestError, to_dict
from framestream.pipeline.config.subset import select_subset
from framestream.pipeline.planning.dataset import ConcatDataset, mix_roots
from framestream.pipeline.planning.mixing import CHUNK, EntryQuota, apportion, draw_samples, epoch_order
from framestream.pipeline.planning.packing import costs, pack
from framestream.pipeline.shards.index import ShardsError


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one optimiser step."""

    rows: list[np.ndarray]  #: R int64 arrays of numbers of dialogues; rank r runs row j * world size + r in step j
    total_weight: float  #: loss weight of all dialogues


class EpochPlan:
    """Order, rows and weights of every epoch of one split under one manifest."""

    def __init__(self, corpus: ConcatDataset, manifest: Manifest, split: str) -> None:
        self.dataset, self.manifest, self.split = corpus, manifest, split
        self.quotas, self.excluded = _shares(corpus, manifest, split)
        corpus.release()
        if not any(share.num_samples for share in self.quotas):
            raise ShardsError(f"{self._roots()}: no dialogue of split {split} can be used; {self._why()}")
        side = manifest.frames.size // manifest.model.vision_tower.patch
        self.patches = side * side  #: of a frame
        self._epoch, self._order = 0, self._order_of(0)
        if not len(self._order):
            raise ShardsError(
                f"{self._roots()}: batching.order modality_length leaves out the last global batch of either kind, and "
                f"split {split} has no others; use modality, or a smaller batching.global_batch"
            )

    def _roots(self) -> str:
        return ", ".join(str(part.index.root) for part in self.dataset.parts)

    def _why(self) -> str:
        if not len(self.excluded):
            named = "mix takes none" if self.manifest.mix else "the manifest's data.entries name none"
            return f"{named}, or all are in the build's ledger"
        return f"{len(self.excluded)} are left out, the first because {self.dataset.skip_reason(int(self.excluded[0]))}"

    @property
    def draw_samples(self) -> int:
        """Dialogues of an epoch, each as often as it appears, ``dropped`` ones included."""
        return sum(share.num_samples for share in self.quotas)

    @property
    def dropped(self) -> int:
        """Appearances that ``batching.order`` leaves out of an epoch, others in each."""
        return self.draw_samples - len(self._order)

    @property
    def truncated(self) -> np.ndarray:
        """The numbers of dialogues of epochs that lose their end to ``text.max_tokens``, int64, ascending."""
        corpus = self.dataset
        cuts = [part.tokens.truncated + start for part, start in zip(corpus.parts, corpus.starts, strict=False)]
        every = np.concatenate(cuts)
        taken = [every[np.isin(every, share.numbers)] for share in self.quotas]
        return np.sort(np.concatenate(taken)).astype(np.int64)

    @property
    def batches(self) -> int:
        """Global batches of an epoch; the last may be smaller than the others."""
        return -(-len(self._order) // self.manifest.batching.global_batch)

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of an epoch's dialogues, in order, each as often as it appears."""
        if epoch != self._epoch:
            self._order = np.empty(0, dtype=np.int32)  # one at a time
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._order

    def _order_of(self, epoch: int) -> np.ndarray:
        corpus, batching, seed = self.dataset, self.manifest.batching, self.manifest.seed
        numbers = draw_samples(self.quotas, len(corpus), seed, epoch)
        lengths = np.empty(0, dtype=np.int32)
        if batching.order not in ("shuffle", "sequential"):
            # With compat: published lengths grow with the epoch; those of the last one group the dialogues of all.
            rows = numbers % len(corpus)
            kinds = np.where(corpus.clips[rows] + corpus.tiles[rows] > 0, 1, -1)
            lengths = kinds * corpus.length[rows].astype(np.int64)
        order = epoch_order(numbers, lengths, batching, seed, epoch)
        return order if numbers[-1] < len(corpus) else (order % len(corpus)).astype(np.int32)

    def num_vision_units(self, rows: np.ndarray) -> int:
        """Clips and tiles of dialogues together: what goes through the vision tower one by one."""
        return int(self.dataset.clips[rows].sum() + self.dataset.tiles[rows].sum())

    def num_images(self, rows: np.ndarray) -> np.ndarray:
        """Frames and tiles of each dialogue, int64 (n,)."""
        clips = self.dataset.clips[rows].astype(np.int64)
        return clips * self.manifest.frames.clip_frames + self.dataset.tiles[rows]

    def costs(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Estimated FLOPs of dialogues, float64 (n,)."""
        lengths = self.dataset.for_epoch(epoch).length[rows].astype(np.int64)
        return costs(self.manifest.batching.cost, self.num_images(rows) * self.patches, lengths)

    def global_batch(self, epoch: int, step: int) -> GlobalBatch:
        """Slice ``step`` of the epoch's order, as rows."""
        batching, size = self.manifest.batching, self.manifest.batching.global_batch
        members = self.order(epoch)[step * size : (step + 1) * size].astype(np.int64)
        corpus = self.dataset.for_epoch(epoch)
        lengths = corpus.length[members].astype(np.int64)
        packed = pack(lengths, self.costs(epoch, members), self.manifest.text.max_tokens, batching.row_multiple)
        by_token = batching.loss_weight == "token"
        weight = float(corpus.num_label_tokens[members].sum()) if by_token else float(len(members))
        return GlobalBatch([members[row] for row in packed], weight)

    def weight(self, row: int, epoch: int) -> float:
        """Loss weight of each labelled place of one dialogue."""
        by_token = self.manifest.batching.loss_weight == "token"
        return 1.0 if by_token else 1.0 / float(self.dataset.for_epoch(epoch).num_label_tokens[row])

    def num_tower_groups(self, rows: list[np.ndarray]) -> int:
        """Tower groups of a micro-step whose ranks run ``rows``: the maximum over them, at least 1."""
        size = self.manifest.model.vision_tower.group_clips
        return max(1, *(-(-self.num_vision_units(row) // size) for row in rows))

    def fingerprint(self) -> dict[str, object]:
        """Everything that decides order and contents of global batches, by name; where roots lie is no part of it."""
        manifest, batching = self.manifest, self.manifest.batching
        cost, roots = batching.cost, {}
        for number, part in enumerate(self.dataset.parts):
            place = f"mix[{number}]." if manifest.mix else ""
            roots |= {f"{place}index": part.index.fingerprint, f"{place}tokens": part.tokens.fingerprint}
            settings = to_dict(manifest.mix[number]) if manifest.mix else {}
            roots |= {f"{place}{name}": value for name, value in settings.items() if name != "root"}
        return {
            **roots,
            "split": self.split,
            "seed": manifest.seed,
            "text.max_tokens": manifest.text.max_tokens,
            "text.over_length": manifest.text.over_length,
            "batching.global_batch": batching.global_batch,
            "batching.row_multiple": batching.row_multiple,
            "batching.order": batching.order,
            "batching.cost": None if cost is None else [cost.patch, cost.token, cost.pair],
            "patches of a frame": self.patches,
        }


# What is taken of each root -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pool:
    """Usable dialogues of one entry, or of all entries of a root that ``mix`` does not name."""

    numbers: np.ndarray  #: int32 (n,)
    wanted: int  #: appearances without weights
    cap: int | None


def _shares(corpus: ConcatDataset, manifest: Manifest, split: str) -> tuple[list[EntryQuota], np.ndarray]:
    """What every epoch takes, and the numbers of dialogues that it would take if they could be used, int64."""
    pools, left_out = [], []
    roots = mix_roots(manifest)
    for number, root in enumerate(roots):
        here, left = _pools(corpus, number, root, split, manifest.seed)
        pools.append(here)
        left_out.append(left)
    counts = [[pool.wanted for pool in here] for here in pools]
    if roots[0].weight is not None:
        counts = _weighted(roots, pools, split)
    shares = [
        EntryQuota(pool.numbers, count)
        for here, row in zip(pools, counts, strict=True)
        for pool, count in zip(here, row, strict=True)
        if count
    ]
    return shares, np.concatenate(left_out)


def _pools(
    corpus: ConcatDataset, number: int, root: MixRootConfig, split: str, seed: int
) -> tuple[list[_Pool], np.ndarray]:
    part, start = corpus.parts[number], corpus.starts[number]
    in_split, usable = part.in_split(split), part.tokens.num_label_tokens > 0
    pools, taken = [], np.zeros(len(usable), dtype=bool)
    codes = part.entry_codes([entry.entry for entry in root.entries]) if root.entries else None
    for place, entry in enumerate(root.entries):
        rows = _places(in_split & (codes == place))
        chosen = select_subset(entry.sampling, len(rows), seed)
        rows = rows[chosen.start : chosen.stop] if isinstance(chosen, range) else rows[chosen]
        repeat = root.repeat if entry.repeat is None else entry.repeat
        if repeat:
            taken[rows] = True
            pools.append(_pool(rows[usable[rows]] + np.int32(start), repeat, entry.cap))
    if root.repeat:
        others = in_split if codes is None else in_split & (codes < 0)
        taken |= others
        pools.append(_pool(_places(others & usable) + np.int32(start), root.repeat, None))
    return pools, np.flatnonzero(taken & ~usable) + start


def _places(mask: np.ndarray) -> np.ndarray:
    """Where ``mask`` is true, int32 (n,); part by part, for numpy takes 8 bytes a place."""
    starts = range(0, len(mask), CHUNK)
    parts = [np.flatnonzero(mask[start : start + CHUNK]).astype(np.int32) + np.int32(start) for start in starts]
    return np.concatenate([np.empty(0, dtype=np.int32), *parts])


def _pool(numbers: np.ndarray, repeat: float, cap: int | None) -> _Pool:
    count = int(Fraction(str(repeat)) * len(numbers) + Fraction(1, 2))
    return _Pool(numbers, count if cap is None else min(count, cap), cap)


def _weighted(roots: tuple[MixRootConfig, ...], pools: list[list[_Pool]], split: str) -> list[list[int]]:
    """As many appearances as without weights, by weight; within a root in its own proportions, none above its cap."""
    total = sum(pool.wanted for here in pools for pool in here)
    sizes = apportion(total, [Fraction(str(root.weight)) for root in roots])
    counts = []
    for number, (size, here) in enumerate(zip(sizes, pools, strict=True)):
        try:
            counts.append(apportion(size, [Fraction(pool.wanted) for pool in here], [pool.cap for pool in here]))
        except ValueError as error:
            raise ManifestError(
                f"mix[{number}].weight: is {size:,} of {total:,} dialogues of split {split} in an epoch, which its "
                f"dialogues and caps do not give ({error}); lower it, or raise a cap"
            ) from None
    return counts
