"""One row on its way: planned, decoded into a buffer by tasks, and put together when they are done."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.buffer_pool import Buffer, BufferPool
from framestream.pipeline.loading.collate import MicroStep, PackedSample, collate
from framestream.pipeline.loading.decode_threads import DecodeItem, Decoder, DecodeTask, split_tasks
from framestream.pipeline.shards.media_view import MediaView

MOST_LENT = 128  #: buffers that may be out before a consumer that keeps its batches is given copies
POLL = 0.5  #: seconds between looks at the decoders while a row waits for them


@dataclass(slots=True, eq=False)
class PendingRow:
    """One planned row of D dialogues."""

    micro_step: MicroStep
    keys: list[str]
    texts: list[tuple[np.ndarray, np.ndarray]]
    weights: list[float]
    views: list[list[MediaView]]
    clip_offsets: np.ndarray  #: int64 (D + 1,), where the clips of each dialogue start and end
    tile_offsets: np.ndarray
    clip_shape: tuple[int, int, int, int]
    _pictures: np.ndarray | None = None  #: uint8 (P, S, S, 3): frames of all clips, then tiles
    _buffer: Buffer | None = None
    _left: int = 0  #: tasks that are not done
    _tasks: list[DecodeTask] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def frames(self) -> int:
        """Frames of all clips."""
        return int(self.clip_offsets[-1]) * self.clip_shape[0]

    @property
    def num_images(self) -> int:
        """Frames of all clips, and tiles."""
        return self.frames + int(self.tile_offsets[-1])

    def start(self, decoders: Decoder, pool: BufferPool, needed: bool) -> bool:
        """Give all decoding to ``decoders``; false, and nothing done, where ``pool`` has no room and it can wait."""
        shape = (self.num_images, *self.clip_shape[1:])
        lent = pool.acquire(int(np.prod(shape)), needed)
        if lent is None:
            return False
        self._pictures, self._buffer = lent[0].reshape(shape), lent[1]
        self._tasks = split_tasks(self._items(), self._pictures, self._buffer, self._done)
        self._left = len(self._tasks)
        if not self._left:
            self._ready.set()
        for task in self._tasks:
            decoders.submit(task)
        return True

    def finish(self, decoders: Decoder, pool: BufferPool) -> Batch:
        """Wait for the tasks and make the row; dialogues whose media cannot be read are left out of it.

        Its clips and stills lie in the buffer, which is used again when the batch's tensors are gone.
        """
        while not self._ready.wait(POLL):
            decoders.raise_if_failed()
        failed: dict[int, str] = {}
        tasks, self._tasks = self._tasks, []  # tasks and row refer to each other, and both to the buffer
        for task in tasks:
            if task.error:
                raise task.error
            for place, reason in sorted(task.failed.items()):
                failed.setdefault(task.items[place].dialogue, reason)
        if any(task.stuck for task in tasks):
            pool.discard(self._buffer)
        pool.release(self._buffer)
        clips, stills = self._clips, self._stills
        pieces = [self._piece(number, clips, stills) for number in range(len(self.keys)) if number not in failed]
        if failed:
            clips = np.concatenate([clips[:0], *(piece.clips for piece in pieces)])
            stills = np.concatenate([stills[:0], *(piece.tiles for piece in pieces)])
        elif pool.in_use > MOST_LENT:
            clips, stills = clips.copy(), stills.copy()
        skipped = [(self.keys[number], reason) for number, reason in sorted(failed.items())]
        return collate(self.micro_step, pieces, clips, stills, skipped)

    def abandon(self, pool: BufferPool) -> None:
        """Nobody will ask for the row; its buffer is used again when no thread writes to it any more."""
        self._tasks = []
        pool.release(self._buffer)

    @property
    def _clips(self) -> np.ndarray:
        return self._pictures[: self.frames].reshape(-1, *self.clip_shape)

    @property
    def _stills(self) -> np.ndarray:
        return self._pictures[self.frames :]

    def _items(self) -> list[DecodeItem]:
        items = []
        frame, tile = 0, self.frames
        for number, shown in enumerate(self.views):
            for view in shown:
                if view.tiles:
                    items.append(DecodeItem(view, 0, tile, view.tiles, number))
                    tile += view.tiles
                else:
                    items.append(DecodeItem(view, 0, frame, len(view.frame_indices), number))
                    frame += len(view.frame_indices)
        return items

    def _done(self, task: DecodeTask) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._ready.set()

    def _piece(self, number: int, clips: np.ndarray, stills: np.ndarray) -> PackedSample:
        clips = clips[self.clip_offsets[number] : self.clip_offsets[number + 1]]
        stills = stills[self.tile_offsets[number] : self.tile_offsets[number + 1]]
        ids, labels = self.texts[number]
        return PackedSample(self.keys[number], ids, labels, self.weights[number], self.views[number], clips, stills)
