"""A cache of the least recently used values within a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteCache(Generic[Value]):
    """Values by key. Above ``max_bytes`` the least recently used are dropped. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._lock = max_bytes, threading.Lock()
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.nbytes = 0  #: of all values
        self.hits = self.misses = 0  #: calls of :meth:`get` that found a value, or none

    def get(self, key: Hashable) -> Value | None:
        """Return the value of ``key``, or None."""
        with self._lock:
            if key not in self._values:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key][0]

    def peek(self, key: Hashable) -> Value | None:
        """Return the value of ``key``, or None, without counting it as used."""
        with self._lock:
            return self._values[key][0] if key in self._values else None

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keep a value of ``size`` bytes, unless it is larger than the cache."""
        with self._lock:
            if key in self._values:
                self.nbytes -= self._values.pop(key)[1]
            if size > self._max_bytes:
                return
            self._values[key] = value, size
            self.nbytes += size
            while self.nbytes > self._max_bytes:
                self.nbytes -= self._values.popitem(last=False)[1][1]
