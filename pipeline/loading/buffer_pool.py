"""Reusable buffer pool for decoded pixels: fresh memory pages cost about as much as decoding a JPEG into them.

A buffer is handed out as an array. It returns to the pool by itself when nothing refers to that array any more: no view
of it, no tensor made of it, no thread that still writes to it. Memory that worker processes write to has no name in any
file system (``memfd_create``). So nothing is left behind, however the processes end.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Size of the smallest buffer. A row without pixels counts as one, so that the number of such rows is bounded too.
MIN_BUFFER_BYTES = 1 << 20
MAX_FREE_BUFFERS = 64  #: buffers that wait for reuse; each of shared memory has two open files


@dataclass(slots=True, eq=False)
class Buffer:
    """A block of memory of the pool, free or in use."""

    number: int  #: of the buffer in its pool; never used twice
    memory: mmap.mmap
    descriptor: int  #: file descriptor of shared memory, for worker processes; -1 for private memory

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file, with a function that is still there when the interpreter has dropped this module."""
        if self.descriptor >= 0:
            close(self.descriptor)


class BufferPool:
    """Buffers of one consumer. Only one thread may call :meth:`acquire`.

    Prefetched buffers (acquired and not yet released) and free buffers together have at most ``max_bytes`` bytes, with
    two exceptions. One prefetched buffer may be of any size. Two free buffers may exceed the bound: those that the
    consumer had and drops while all others are in use. After :meth:`release` a buffer belongs to the consumer and no
    longer counts.

    Args:
        max_bytes: bound on the memory of prefetched and free buffers.
        shared: allocate memory that other processes can map.
    """

    def __init__(self, max_bytes: int, shared: bool) -> None:
        self._max_bytes, self._shared = max_bytes, shared
        self._num_created, self._last_size = 0, 0
        self._acquired: dict[int, Buffer] = {}
        self._prefetched: dict[int, int] = {}  # number of a buffer that is not yet released -> its bytes
        self._free: list[Buffer] = []
        # Finalizers append to it during garbage collection, in any thread. So it must not need a lock.
        self._returned: deque[int] = deque()

    @property
    def numbers(self) -> set[int]:
        """Numbers of all buffers, in use and free."""
        return self._acquired.keys() | {buffer.number for buffer in self._free}

    @property
    def in_use(self) -> int:
        """Number of buffers that something still refers to."""
        self._collect()
        return len(self._acquired)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, including released ones that are still in use."""
        self._collect()
        return sum(len(buffer.memory) for buffer in (*self._acquired.values(), *self._free))

    def acquire(self, size: int, needed: bool = False) -> tuple[np.ndarray, Buffer] | None:
        """Return an array of ``size`` bytes with arbitrary content, and its buffer.

        The buffer is reused only when nothing refers to the array, or to anything made of the array, any more.

        Args:
            size: in bytes.
            needed: ignore the bound.

        Returns:
            uint8 (size,) and its buffer. None if this would exceed the bound and other buffers are prefetched.
        """
        self._collect()
        wanted = _rounded(size)
        # the smallest that fits; of equal ones the last that returned, which the processor may still have in its cache
        fitting = [buffer for buffer in reversed(self._free) if wanted <= len(buffer.memory) <= 2 * wanted]
        buffer = min(fitting, key=lambda buffer: len(buffer.memory), default=None)
        prefetched = sum(self._prefetched.values())
        if prefetched and not needed and prefetched + (len(buffer.memory) if buffer else wanted) > self._max_bytes:
            return None
        if buffer:
            self._free.remove(buffer)
        else:
            self._trim(self._max_bytes - prefetched - wanted)
            buffer = self._allocate(wanted)
        # Views of a view refer to the array at their base. So this array lives as long as any of them.
        array = np.frombuffer(buffer.memory, dtype=np.uint8)
        self._last_size = len(buffer.memory)
        self._acquired[buffer.number], self._prefetched[buffer.number] = buffer, self._last_size
        weakref.finalize(array, self._returned.append, buffer.number).atexit = False
        return array[:size], buffer

    def release(self, buffer: Buffer) -> None:
        """Pass ``buffer`` to the consumer: it no longer counts as prefetched."""
        self._prefetched.pop(buffer.number, None)

    def discard(self, buffer: Buffer) -> None:
        """Never reuse ``buffer``: a thread that cannot be stopped may still write to it."""
        self._acquired.pop(buffer.number, None)
        self._prefetched.pop(buffer.number, None)

    def _allocate(self, size: int) -> Buffer:
        self._num_created += 1
        if not self._shared:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return Buffer(self._num_created, memory, -1)
        descriptor = os.memfd_create("framestream", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return Buffer(self._num_created, mmap.mmap(descriptor, size), descriptor)

    def _collect(self) -> None:
        """Move buffers that nothing refers to any more to the free ones."""
        while self._returned:
            number = self._returned.popleft()
            self._prefetched.pop(number, None)
            if number in self._acquired:
                self._free.append(self._acquired.pop(number))
        self._trim(self._max_bytes - sum(self._prefetched.values()))

    def _trim(self, max_free: int) -> None:
        """Give the longest unused memory back to the system, until the free buffers have ``max_free`` bytes."""
        max_free = max(max_free, 2 * self._last_size)
        free = sum(len(buffer.memory) for buffer in self._free)
        while self._free and (free > max_free or len(self._free) > MAX_FREE_BUFFERS):
            free -= len(self._free.pop(0).memory)


def _rounded(size: int) -> int:
    """Round ``size`` up by at most an eighth, so that rows of nearly equal size can share a buffer."""
    step = max(MIN_BUFFER_BYTES, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step
