"""Memory for decoded pixels that is used again: fresh pages cost about as much as decoding a JPEG into them.

A buffer is lent as an array and comes back by itself when nothing refers to that array any more: no view of it, no
tensor made of it, no thread that still writes to it. Memory that worker processes write to has no name in any file
system (``memfd_create``), so that nothing is left behind however the processes end.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

LEAST = 1 << 20  #: bytes of the smallest buffer; also what a row without pixels counts, so that such rows are bounded
MOST_FREE = 64  #: buffers that wait to be used again; each of shared memory has two open files


@dataclass(slots=True, eq=False)
class Buffer:
    """Some memory, lent or not."""

    number: int  #: of the buffer in its pool; never given twice
    memory: mmap.mmap
    descriptor: int  #: of the shared memory, for worker processes; -1 for memory of this process alone

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class BufferPool:
    """Buffers of one consumer; :meth:`take` is called by one thread.

    What is decoded ahead and what waits to be used again are at most ``bound`` bytes together, but for one buffer ahead
    and two that wait, however large: those that a consumer had and lets go while everything ahead is in use. Arrays
    that were handed on (:meth:`hand_on`) count no more.

    Args:
        bound: bytes.
        shared: make memory that other processes can map.
    """

    def __init__(self, bound: int, shared: bool) -> None:
        self._bound, self._shared = bound, shared
        self._made, self._last = 0, 0
        self._lent: dict[int, Buffer] = {}
        self._ahead: dict[int, int] = {}  # number of a buffer not yet handed on -> its bytes
        self._free: list[Buffer] = []
        self._returned: deque[int] = deque()  # appended to while garbage is collected: without a lock, in any thread

    @property
    def numbers(self) -> set[int]:
        """Of all buffers, lent and free."""
        return self._lent.keys() | {buffer.number for buffer in self._free}

    @property
    def in_use(self) -> int:
        """Number of buffers that somebody holds."""
        self._collect()
        return len(self._lent)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, those that were handed on and are still held included."""
        self._collect()
        return sum(len(buffer.memory) for buffer in (*self._lent.values(), *self._free))

    def acquire(self, size: int, needed: bool = False) -> tuple[np.ndarray, Buffer] | None:
        """``size`` bytes (size,) uint8 with any content; None where they and those ahead exceed the bound.

        With ``needed``, or with none ahead, there is always room.

        The array alone keeps the buffer from being used again, and everything that was made of the array does.
        """
        self._collect()
        wanted = _rounded(size)
        # of the smallest that fit the last one to come back: some of it may still be in the processor's cache
        fitting = [buffer for buffer in reversed(self._free) if wanted <= len(buffer.memory) <= 2 * wanted]
        buffer = min(fitting, key=lambda buffer: len(buffer.memory), default=None)
        ahead = sum(self._ahead.values())
        if ahead and not needed and ahead + (len(buffer.memory) if buffer else wanted) > self._bound:
            return None
        if buffer:
            self._free.remove(buffer)
        else:
            self._trim(self._bound - ahead - wanted)
            buffer = self._make(wanted)
        array = np.frombuffer(buffer.memory, dtype=np.uint8)  # views of it refer to it: they end at an array's base
        self._last = len(buffer.memory)
        self._lent[buffer.number], self._ahead[buffer.number] = buffer, self._last
        weakref.finalize(array, self._returned.append, buffer.number).atexit = False
        return array[:size], buffer

    def release(self, buffer: Buffer) -> None:
        """``buffer`` belongs to the consumer now, and counts no more as ahead."""
        self._ahead.pop(buffer.number, None)

    def discard(self, buffer: Buffer) -> None:
        """Never lend ``buffer`` again: somebody out of reach may still write to it."""
        self._lent.pop(buffer.number, None)
        self._ahead.pop(buffer.number, None)

    def _make(self, size: int) -> Buffer:
        self._made += 1
        if not self._shared:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return Buffer(self._made, memory, -1)
        descriptor = os.memfd_create("framestream", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return Buffer(self._made, mmap.mmap(descriptor, size), descriptor)

    def _collect(self) -> None:
        """Take back what nobody refers to any more."""
        while self._returned:
            number = self._returned.popleft()
            self._ahead.pop(number, None)
            if number in self._lent:
                self._free.append(self._lent.pop(number))
        self._trim(self._bound - sum(self._ahead.values()))

    def _trim(self, room: int) -> None:
        """Give memory back to the system, what was free longest first, until ``room`` bytes hold what is free."""
        room = max(room, 2 * self._last)
        spare = sum(len(buffer.memory) for buffer in self._free)
        while self._free and (spare > room or len(self._free) > MOST_FREE):
            spare -= len(self._free.pop(0).memory)


def _rounded(size: int) -> int:
    """At most an eighth above ``size``, so that rows of nearly equal size can follow each other in one buffer."""
    step = max(LEAST, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step
