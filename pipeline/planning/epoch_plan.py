"""Plan of an epoch: which dialogues form a global batch, its rows, and what each rank runs.

Everything is computed from lengths in the index and the token cache. No media are read, and nothing depends on threads
or timing. Rows do not depend on the number of ranks; only the assignment of rows to ranks does.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from framestream.pipeline.config.data import MixRootConfig
from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.config.subset import select_subset
from framestream.pipeline.planning.dataset import ConcatDataset, mix_roots
from framestream.pipeline.planning.mixing import CHUNK, EntryQuota, apportion, draw_samples, epoch_order
from framestream.pipeline.planning.packing import costs, count_rows, pack
from framestream.pipeline.shards.index import ShardsError


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one optimizer step."""

    rows: list[np.ndarray]  #: R int64 arrays of dialogue numbers; rank r runs row j * world size + r in micro-step j
    total_weight: float  #: loss weight of all dialogues


class EpochPlan:
    """Order, rows and weights of every epoch of one split under one manifest."""

    def __init__(self, dataset: ConcatDataset, manifest: Manifest, split: str) -> None:
        self.dataset, self.manifest, self.split = dataset, manifest, split
        self.quotas, self.excluded = _entry_quotas(dataset, manifest, split)
        dataset.release()
        if not any(quota.num_samples for quota in self.quotas):
            raise ShardsError(f"{self._roots()}: no dialogue of split {split} can be used; {self._explain_empty()}")
        side = manifest.frames.size // manifest.model.vision_tower.patch
        self.patches = side * side  #: vision patches of a frame
        self._epoch, self._order = 0, self._compute_order(0)
        self._row_counts: tuple[int, list[int]] = -1, []  # an epoch, and the number of rows of each global batch
        if not len(self._order):
            raise ShardsError(
                f"{self._roots()}: batching.order modality_length drops the last global batch of each modality, and "
                f"split {split} has no others; use modality, or a smaller batching.global_batch"
            )

    def _roots(self) -> str:
        return ", ".join(str(part.index.root) for part in self.dataset.parts)

    def _explain_empty(self) -> str:
        if not len(self.excluded):
            source = "mix takes none" if self.manifest.mix else "the manifest's data.entries name none"
            return f"{source}, or all are in the build's ledger"
        return f"{len(self.excluded)} are excluded, the first because {self.dataset.skip_reason(int(self.excluded[0]))}"

    @property
    def num_samples(self) -> int:
        """Samples of an epoch: its dialogues with repetitions, including dropped ones."""
        return sum(quota.num_samples for quota in self.quotas)

    @property
    def num_dropped(self) -> int:
        """Samples that ``batching.order`` drops from an epoch; different ones in each epoch."""
        return self.num_samples - len(self._order)

    @property
    def truncated(self) -> np.ndarray:
        """The numbers of dialogues in the plan that are truncated to ``text.max_tokens``, int64, ascending."""
        dataset = self.dataset
        rows = [part.tokens.truncated + start for part, start in zip(dataset.parts, dataset.starts, strict=False)]
        truncated = np.concatenate(rows)
        used = [truncated[np.isin(truncated, quota.numbers)] for quota in self.quotas]
        return np.sort(np.concatenate(used)).astype(np.int64)

    @property
    def num_batches(self) -> int:
        """Number of global batches of an epoch; the last may be smaller than the others."""
        return -(-len(self._order) // self.manifest.batching.global_batch)

    def order(self, epoch: int) -> np.ndarray:
        """Return the numbers of the dialogues of an epoch, with repetitions, in order."""
        if epoch != self._epoch:
            self._order = np.empty(0, dtype=np.int32)  # frees the old order before the new one is made
            self._epoch, self._order = epoch, self._compute_order(epoch)
        return self._order

    def _compute_order(self, epoch: int) -> np.ndarray:
        dataset, batching, seed = self.dataset, self.manifest.batching, self.manifest.seed
        numbers = draw_samples(self.quotas, len(dataset), seed, epoch)
        lengths = np.empty(0, dtype=np.int32)
        if batching.order not in ("shuffle", "sequential"):
            # With compat: published, lengths grow with the epoch. The lengths of the last epoch are used for all.
            rows = numbers % len(dataset)
            signs = np.where(dataset.clips[rows] + dataset.tiles[rows] > 0, 1, -1)
            lengths = signs * dataset.length[rows].astype(np.int64)
        order = epoch_order(numbers, lengths, batching, seed, epoch)
        return order if numbers[-1] < len(dataset) else (order % len(dataset)).astype(np.int32)

    def num_images(self, rows: np.ndarray) -> np.ndarray:
        """Count the frames and image tiles of each dialogue, int64 (n,)."""
        clips = self.dataset.clips[rows].astype(np.int64)
        return clips * self.manifest.frames.clip_frames + self.dataset.tiles[rows]

    def costs(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Estimate the FLOPs of dialogues, float64 (n,)."""
        lengths = self.dataset.for_epoch(epoch).length[rows].astype(np.int64)
        return costs(self.manifest.batching.cost, self.num_images(rows) * self.patches, lengths)

    def global_batch(self, epoch: int, step: int) -> GlobalBatch:
        """Pack slice ``step`` of the order of the epoch into rows."""
        batching, members = self.manifest.batching, self._members(epoch, step)
        dataset = self.dataset.for_epoch(epoch)
        lengths = dataset.length[members].astype(np.int64)
        packed = pack(lengths, self.costs(epoch, members), self.manifest.text.max_tokens, batching.row_multiple)
        by_token = batching.loss_weight == "token"
        weight = float(dataset.num_label_tokens[members].sum()) if by_token else float(len(members))
        return GlobalBatch([members[row] for row in packed], weight)

    def num_rows(self, epoch: int, first: int = 0) -> int:
        """Count the rows of the global batches of an epoch from number ``first`` on.

        The first call for an epoch packs each of its global batches, which takes some milliseconds for each.
        """
        if self._row_counts[0] != epoch:
            batching, limit = self.manifest.batching, self.manifest.text.max_tokens
            length, counts = self.dataset.for_epoch(epoch).length, []
            for step in range(self.num_batches):
                members = self._members(epoch, step)
                lengths = length[members].astype(np.int64)
                counts.append(count_rows(lengths, self.costs(epoch, members), limit, batching.row_multiple))
            self._row_counts = epoch, counts
        return sum(self._row_counts[1][first:])

    def _members(self, epoch: int, step: int) -> np.ndarray:
        """Return the numbers of the dialogues of a global batch, int64 (n,)."""
        size = self.manifest.batching.global_batch
        return self.order(epoch)[step * size : (step + 1) * size].astype(np.int64)

    def token_weight(self, row: int, epoch: int) -> float:
        """Return the loss weight of each labeled token of one dialogue."""
        by_token = self.manifest.batching.loss_weight == "token"
        return 1.0 if by_token else 1.0 / float(self.dataset.for_epoch(epoch).num_label_tokens[row])

    def fingerprint(self) -> dict[str, object]:
        """Return all that decides the order and contents of global batches, by name; addresses of roots do not."""
        manifest, batching = self.manifest, self.manifest.batching
        cost = batching.cost
        roots: dict[str, object] = {}
        for number, part in enumerate(self.dataset.parts):
            prefix = f"mix[{number}]." if manifest.mix else ""
            roots |= {f"{prefix}index": part.index.fingerprint, f"{prefix}tokens": part.tokens.fingerprint}
            settings = to_dict(manifest.mix[number]) if manifest.mix else {}
            roots |= {f"{prefix}{name}": value for name, value in settings.items() if name != "root"}
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


# Quotas of each root --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pool:
    """Usable dialogues of one entry, or of all entries of a root that ``mix`` does not name."""

    numbers: np.ndarray  #: int32 (n,)
    num_samples: int  #: without weights
    cap: int | None


def _entry_quotas(dataset: ConcatDataset, manifest: Manifest, split: str) -> tuple[list[EntryQuota], np.ndarray]:
    """Return the quotas of every epoch, and the numbers of its dialogues that cannot be used, int64."""
    pools, excluded = [], []
    roots = mix_roots(manifest)
    for number, root in enumerate(roots):
        root_pools, unusable = _pools(dataset, number, root, split, manifest.seed)
        pools.append(root_pools)
        excluded.append(unusable)
    counts = [[pool.num_samples for pool in root_pools] for root_pools in pools]
    if roots[0].weight is not None:
        counts = _weighted_counts(roots, pools, split)
    quotas = [
        EntryQuota(pool.numbers, count)
        for root_pools, root_counts in zip(pools, counts, strict=True)
        for pool, count in zip(root_pools, root_counts, strict=True)
        if count
    ]
    return quotas, np.concatenate(excluded)


def _pools(
    dataset: ConcatDataset, number: int, root: MixRootConfig, split: str, seed: int
) -> tuple[list[_Pool], np.ndarray]:
    """Return the pools of one root, and the numbers of its selected dialogues that cannot be used."""
    part, start = dataset.parts[number], dataset.starts[number]
    in_split, usable = part.in_split(split), part.tokens.num_label_tokens > 0
    pools, selected = [], np.zeros(len(usable), dtype=bool)
    codes = part.entry_codes([entry.entry for entry in root.entries]) if root.entries else None
    for code, entry in enumerate(root.entries):
        rows = _flatnonzero(in_split & (codes == code))
        chosen = select_subset(entry.sampling, len(rows), seed)
        rows = rows[chosen.start : chosen.stop] if isinstance(chosen, range) else rows[chosen]
        repeat = root.repeat if entry.repeat is None else entry.repeat
        if repeat:
            selected[rows] = True
            pools.append(_pool(rows[usable[rows]] + np.int32(start), repeat, entry.cap))
    if root.repeat:
        others = in_split if codes is None else in_split & (codes < 0)
        selected |= others
        pools.append(_pool(_flatnonzero(others & usable) + np.int32(start), root.repeat, None))
    return pools, np.flatnonzero(selected & ~usable) + start


def _flatnonzero(mask: np.ndarray) -> np.ndarray:
    """Return where ``mask`` is true, int32 (n,). It goes part by part, because numpy needs 8 bytes per index."""
    starts = range(0, len(mask), CHUNK)
    parts = [np.flatnonzero(mask[start : start + CHUNK]).astype(np.int32) + np.int32(start) for start in starts]
    return np.concatenate([np.empty(0, dtype=np.int32), *parts])


def _pool(numbers: np.ndarray, repeat: float, cap: int | None) -> _Pool:
    count = int(Fraction(str(repeat)) * len(numbers) + Fraction(1, 2))
    return _Pool(numbers, count if cap is None else min(count, cap), cap)


def _weighted_counts(roots: tuple[MixRootConfig, ...], pools: list[list[_Pool]], split: str) -> list[list[int]]:
    """Split the samples of an epoch among roots by weight.

    The total is that of the roots without weights. Within a root, pools keep their proportions, and none exceeds its
    cap.
    """
    total = sum(pool.num_samples for root_pools in pools for pool in root_pools)
    sizes = apportion(total, [Fraction(str(root.weight)) for root in roots])
    counts = []
    for number, (size, root_pools) in enumerate(zip(sizes, pools, strict=True)):
        proportions, caps = [Fraction(pool.num_samples) for pool in root_pools], [pool.cap for pool in root_pools]
        try:
            counts.append(apportion(size, proportions, caps))
        except ValueError as error:
            raise ManifestError(
                f"mix[{number}].weight: is {size:,} of {total:,} dialogues of split {split} in an epoch, more than "
                f"its dialogues and caps allow ({error}); lower it, or raise a cap"
            ) from None
    return counts
