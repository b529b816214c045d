"""Batches for one rank: a plan that is pure arithmetic, and decoding ahead of it in threads.

    loader = build_loader(manifest, rank, world_size)
    for batch in loader:            # one row of this rank; batch.last ends a global batch
        ...
    loader.state_dict()             # how many global batches were handed out, and what decides their order

The state is the number of global batches whose last row was handed out, so that a run continues with exactly the next
one, in constant time, on any number of ranks that divides ``batching.row_multiple``. Threads decode rows in order, as
many ahead as ``loader.prefetch_mb`` of pixels allow; how many threads and how far ahead changes no batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.batch import Batch
from pipeline.conversation import conversation_of
from pipeline.index import Index
from pipeline.manifest import Manifest, ManifestError
from pipeline.plan import Plan, Report
from pipeline.rows import Piece, Place, assemble
from pipeline.storage import Reading
from pipeline.tokens import Tokens
from pipeline.visuals import View, Visuals

CHUNK = 32  #: frames that one task decodes
ROW_BYTES = 1 << 20  #: what a row counts at least against the prefetch bound, so that rows of text are bounded too


class LoaderError(RuntimeError):
    """Reading cannot go on; one line that says why."""


class UnreadableError(LoaderError):
    """More dialogues could not be read than ``loader.max_unreadable``; one line that names files."""


class StateError(LoaderError):
    """A state that belongs to other data or settings; one line that names what differs."""


def build_loader(manifest: Manifest, rank: int = 0, world_size: int = 1, split: str = "train") -> Loader:
    """The loader of one rank over the shards of ``manifest.shard_place``; tokenises the root once where needed.

    Raises:
        ShardsError: no finished shards are there, or none of their dialogues can be used.
        ManifestError: ``world_size`` does not divide ``batching.row_multiple``, or the tokenizer cannot be loaded.
    """
    multiple = manifest.batching.row_multiple
    if world_size < 1 or multiple % world_size:
        raise ManifestError(f"batching.row_multiple: {multiple} is not a multiple of {world_size} ranks; change either")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    index = Index.open(manifest.shard_place, Reading.of(manifest.loader))
    index.check(manifest)
    visuals = Visuals(index, manifest)
    tokens = Tokens(index, manifest, conversation_of(manifest), visuals)
    for epoch in range(manifest.train.epochs):
        tokens.at(epoch)  # all caches are made here, where the first rank is alone
    return Loader(Plan(index, manifest, tokens, split), visuals, rank, world_size, split)


class Loader:
    """Iterates over the rest of the current epoch, then stands at the start of the next one."""

    def __init__(self, plan: Plan, visuals: Visuals, rank: int, world_size: int, split: str) -> None:
        self._plan, self._visuals = plan, visuals
        self._rank, self._world, self._split = rank, world_size, split
        self._media, self._keys = plan.index.dialogues["media"], plan.index.dialogues["key"]
        self._epoch, self._step = 0, 0
        self._unreadable: list[str] = []

    def __len__(self) -> int:
        """Global batches of an epoch, equal on all ranks."""
        return self._plan.batches

    def state_dict(self) -> dict:
        """``epoch``, ``step`` (global batches of it handed out whole) and ``fingerprint``; plain JSON values."""
        return {"epoch": self._epoch, "step": self._step, "fingerprint": self._plan.fingerprint(self._split)}

    def load_state_dict(self, state: dict) -> None:
        """Go to the place of ``state``; the next iteration starts with the global batch after it.

        Raises:
            StateError: the state belongs to another index or to other settings that decide order.
        """
        here, there = self._plan.fingerprint(self._split), state["fingerprint"]
        differ = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if differ:
            what = ", ".join(f"{name} ({there.get(name)} there, {here.get(name)} here)" for name in differ)
            raise StateError(f"the loader's state is of other data or settings: {what}; use those, or start anew")
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def report(self) -> Report:
        """What an epoch contains, by entry; reads nothing but lengths."""
        return self._plan.report()

    def left_out(self) -> Iterator[tuple[str, str]]:
        """(key, reason) of every dialogue of the split that no epoch contains."""
        for row in self._plan.left_out.tolist():
            yield self._keys[row].as_py(), self._plan.tokens.refused[row]

    def __iter__(self) -> Iterator[Batch]:
        """Rows of this rank from the current place to the end of its epoch.

        Raises:
            UnreadableError: more than ``loader.max_unreadable`` dialogues of this rank could not be read.
        """
        epoch, loader = self._epoch, self._plan.manifest.loader
        rows = self._rows(epoch, self._step)
        waiting: deque[_Row] = deque()
        bound, held = loader.prefetch_mb << 20, 0
        pool = ThreadPoolExecutor(loader.threads, thread_name_prefix="decode")
        try:
            upcoming = next(rows, None)
            while upcoming or waiting:
                while upcoming and (not waiting or held + upcoming.nbytes <= bound):
                    upcoming.start(pool, self._visuals)
                    waiting.append(upcoming)
                    held += upcoming.nbytes
                    upcoming = next(rows, None)
                row = waiting.popleft()
                batch = row.finish(self._visuals)
                held -= row.nbytes
                self._note(batch.skipped)
                if batch.last:
                    ended = batch.step + 1 == len(self)
                    self._epoch, self._step = (epoch + 1, 0) if ended else (epoch, batch.step + 1)
                del row  # the consumer alone holds the pixels
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _rows(self, epoch: int, first: int) -> Iterator[_Row]:
        """The rows of this rank, planned one global batch at a time."""
        for step in range(first, len(self)):
            planned = self._plan.global_batch(epoch, step)
            micros = len(planned.rows) // self._world
            for micro in range(micros):
                side_by_side = planned.rows[micro * self._world : (micro + 1) * self._world]
                groups = self._plan.groups(side_by_side)
                place = Place(epoch, step, micro, micros, planned.total_weight, groups)
                yield self._row(place, side_by_side[self._rank].tolist())

    def _row(self, place: Place, dialogues: list[int]) -> _Row:
        frames, tokens = self._plan.manifest.frames, self._plan.tokens.at(place.epoch)
        views = [self._visuals.views(self._media[row].as_py()) for row in dialogues]
        clips = [sum(view.clips for view in shown) for shown in views]
        tiles = [sum(view.tiles for view in shown) for shown in views]
        return _Row(
            place=place,
            keys=[self._keys[row].as_py() for row in dialogues],
            texts=[tokens.of(row) for row in dialogues],
            weights=[self._plan.weight(row, place.epoch) for row in dialogues],
            views=views,
            clip_edges=np.cumsum([0, *clips]),
            tile_edges=np.cumsum([0, *tiles]),
            clip_shape=(frames.clip_frames, frames.size, frames.size, 3),
        )

    def _note(self, skipped: list[tuple[str, str]]) -> None:
        self._unreadable += [reason for _, reason in skipped]
        limit = self._plan.manifest.loader.max_unreadable
        if len(self._unreadable) > limit:
            named = "; ".join(dict.fromkeys(self._unreadable[-5:]))
            raise UnreadableError(
                f"{len(self._unreadable)} dialogues could not be read, more than loader.max_unreadable ({limit}); "
                f"check the shards with these: {named}"
            )


@dataclass(slots=True)
class _Row:
    """One planned row: its pixels are decoded by tasks of a pool into arrays made when the first one starts."""

    place: Place
    keys: list[str]
    texts: list[tuple[np.ndarray, np.ndarray]]
    weights: list[float]
    views: list[list[View]]
    clip_edges: np.ndarray  #: int64 (D + 1,), where the clips of each dialogue start and end
    tile_edges: np.ndarray
    clip_shape: tuple[int, int, int, int]
    clips: np.ndarray | None = None
    stills: np.ndarray | None = None
    tasks: list[tuple[int, View, Future]] | None = None  #: number of the dialogue in the row, medium, task

    @property
    def nbytes(self) -> int:
        """Bytes that the row counts against the prefetch bound."""
        frame = int(np.prod(self.clip_shape[1:]))
        pictures = int(self.clip_edges[-1]) * self.clip_shape[0] + int(self.tile_edges[-1])
        return max(ROW_BYTES, pictures * frame)

    def start(self, pool: ThreadPoolExecutor, visuals: Visuals) -> None:
        """Give all decoding to ``pool``."""
        self.clips = np.empty((self.clip_edges[-1], *self.clip_shape), dtype=np.uint8)
        self.stills = np.empty((self.tile_edges[-1], *self.clip_shape[1:]), dtype=np.uint8)
        frames = self.clips.reshape(-1, *self.clip_shape[1:])
        self.tasks = []
        frame = tile = 0
        for number, shown in enumerate(self.views):
            for view in shown:
                for start in range(0, len(view.places), CHUNK):
                    out = frames[frame + start : frame + min(start + CHUNK, len(view.places))]
                    self.tasks.append((number, view, pool.submit(visuals.read_frames, view, start, out)))
                if view.tiles:
                    out = self.stills[tile : tile + view.tiles]
                    self.tasks.append((number, view, pool.submit(visuals.read_still, view, out)))
                frame, tile = frame + len(view.places), tile + view.tiles

    def finish(self, visuals: Visuals) -> Batch:
        """Wait for the tasks and make the row; dialogues whose media cannot be read are left out of it."""
        failed: dict[int, str] = {}
        for number, view, task in self.tasks:
            try:
                task.result()
            except (OSError, ValueError) as error:
                failed.setdefault(number, f"{visuals.where(view.row)}: {' '.join(str(error).split())}")
        pieces = [self._piece(number) for number in range(len(self.keys)) if number not in failed]
        clips, stills = self.clips, self.stills
        if failed:
            clips = np.concatenate([clips[:0], *(piece.clips for piece in pieces)])
            stills = np.concatenate([stills[:0], *(piece.stills for piece in pieces)])
        skipped = [(self.keys[number], reason) for number, reason in sorted(failed.items())]
        return assemble(self.place, pieces, clips, stills, skipped)

    def _piece(self, number: int) -> Piece:
        clips = self.clips[self.clip_edges[number] : self.clip_edges[number + 1]]
        stills = self.stills[self.tile_edges[number] : self.tile_edges[number + 1]]
        ids, labels = self.texts[number]
        return Piece(self.keys[number], ids, labels, self.weights[number], self.views[number], clips, stills)
