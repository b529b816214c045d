"""A row that is still being decoded: planned, split into decode tasks, then collated into a batch."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.buffer_pool import Buffer, BufferPool
from framestream.pipeline.loading.collate import MicroStep, PackedSample, collate
from framestream.pipeline.loading.decode_threads import DecodeItem, Decoder, DecodeTask, split_tasks
from framestream.pipeline.shards.media_view import MediaView

MAX_BUFFERS_IN_USE = 128  #: above this number, a consumer that stores its batches receives copies
POLL = 0.5  #: seconds between checks of the decoder while a row waits for it


@dataclass(slots=True, eq=False)
class PendingRow:
    """One planned row of D dialogues that is still being decoded. It becomes a :class:`Batch`.

    Call :meth:`start`, then once either :meth:`finish` or :meth:`abandon`.
    """

    micro_step: MicroStep
    keys: list[str]  #: dialogue keys
    texts: list[tuple[np.ndarray, np.ndarray]]  #: token ids and labels of each dialogue
    weights: list[float]  #: loss weight of each labeled token, by dialogue
    views: list[list[MediaView]]  #: media of each dialogue, in order of use
    clip_offsets: np.ndarray  #: int64 (D + 1,), where the clips of each dialogue start and end
    tile_offsets: np.ndarray  #: int64 (D + 1,), where the image tiles of each dialogue start and end
    clip_shape: tuple[int, int, int, int]  #: (frames, S, S, 3)
    _pixels: np.ndarray | None = None  #: uint8 (P, S, S, 3): frames of all clips, then image tiles
    _buffer: Buffer | None = None  #: memory of ``_pixels``
    _num_unfinished: int = 0  #: tasks that are not done
    _tasks: list[DecodeTask] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)  #: of ``_num_unfinished``: tasks end in any thread
    _ready: threading.Event = field(default_factory=threading.Event)

    @property
    def num_frames(self) -> int:
        """Number of frames of all clips."""
        return int(self.clip_offsets[-1]) * self.clip_shape[0]

    @property
    def num_images(self) -> int:
        """Number of frames of all clips and of image tiles."""
        return self.num_frames + int(self.tile_offsets[-1])

    def start(self, decoder: Decoder, pool: BufferPool, needed: bool) -> bool:
        """Submit all decoding to ``decoder``.

        Args:
            decoder: decodes the tasks.
            pool: gives the memory for the pixels.
            needed: start even if the pool has no room, because the consumer waits for this row.

        Returns:
            False, and nothing is submitted, if the pool has no room.
        """
        shape = (self.num_images, *self.clip_shape[1:])
        acquired = pool.acquire(int(np.prod(shape)), needed)
        if acquired is None:
            return False
        self._pixels, self._buffer = acquired[0].reshape(shape), acquired[1]
        self._tasks = split_tasks(self._items(), self._pixels, self._buffer, self._done)
        self._num_unfinished = len(self._tasks)
        if not self._num_unfinished:
            self._ready.set()
        for task in self._tasks:
            decoder.submit(task)
        return True

    def finish(self, decoder: Decoder, pool: BufferPool) -> Batch:
        """Wait for the tasks and make the batch. Dialogues with unreadable media are left out of it.

        The batch's pixels are in the buffer, which is reused when the batch's tensors are gone.

        Raises:
            LoaderError: the decoder failed.
        """
        while not self._ready.wait(POLL):
            decoder.raise_if_failed()
        pixels, buffer = self._memory()
        failed: dict[int, str] = {}
        tasks, self._tasks = self._tasks, []  # breaks the cycle of tasks and row, which would keep the buffer alive
        for task in tasks:
            if task.error:
                raise task.error
            for item, reason in sorted(task.failed.items()):
                failed.setdefault(task.items[item].dialogue, reason)
        if any(task.stuck for task in tasks):
            pool.discard(buffer)
        pool.release(buffer)
        clips, tiles = pixels[: self.num_frames].reshape(-1, *self.clip_shape), pixels[self.num_frames :]
        samples = [self._sample(number, clips, tiles) for number in range(len(self.keys)) if number not in failed]
        if failed:
            clips = np.concatenate([clips[:0], *(sample.clips for sample in samples)])
            tiles = np.concatenate([tiles[:0], *(sample.tiles for sample in samples)])
        elif pool.in_use > MAX_BUFFERS_IN_USE:
            clips, tiles = clips.copy(), tiles.copy()
        skipped = [(self.keys[number], reason) for number, reason in sorted(failed.items())]
        return collate(self.micro_step, samples, clips, tiles, skipped)

    def abandon(self, pool: BufferPool) -> None:
        """Drop the row. Its buffer is reused when no thread writes to it any more."""
        self._tasks = []
        pool.release(self._memory()[1])

    def _memory(self) -> tuple[np.ndarray, Buffer]:
        if self._pixels is None or self._buffer is None:
            raise RuntimeError("the row was not started; call start first")
        return self._pixels, self._buffer

    def _items(self) -> list[DecodeItem]:
        items = []
        frame, tile = 0, self.num_frames
        for number, views in enumerate(self.views):
            for view in views:
                if view.tiles:
                    items.append(DecodeItem(view, 0, tile, view.tiles, number))
                    tile += view.tiles
                else:
                    items.append(DecodeItem(view, 0, frame, len(view.frame_indices), number))
                    frame += len(view.frame_indices)
        return items

    def _done(self, task: DecodeTask) -> None:
        with self._lock:
            self._num_unfinished -= 1
            if not self._num_unfinished:
                self._ready.set()

    def _sample(self, number: int, clips: np.ndarray, tiles: np.ndarray) -> PackedSample:
        clips = clips[self.clip_offsets[number] : self.clip_offsets[number + 1]]
        tiles = tiles[self.tile_offsets[number] : self.tile_offsets[number + 1]]
        ids, labels = self.texts[number]
        return PackedSample(self.keys[number], ids, labels, self.weights[number], self.views[number], clips, tiles)
