"""Numbers for distinct things, in the order in which they first come, in 20 bytes of memory each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

DIGEST = np.dtype("S16")  #: of what a thing is; compared whole, as numpy pads shorter ones with zeros


class UniqueIds:
    """Numbers 0, 1, 2 ... for the distinct texts of any number of batches.

    Digests lie in sorted runs that are merged as soon as a younger one has half the length of its elder, so there are
    at most log2(n) of them and each digest is moved at most log2(n) times.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # digests in order (n,) S16, their numbers (n,) int32
        self.count = 0

    def assign(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The number of each text, int64 (n,), and whether the text comes here for the first time, bool (n,)."""
        digests = [hashlib.blake2b(text.encode(), digest_size=DIGEST.itemsize).digest() for text in texts]
        keys, first, places = np.unique(
            np.frombuffer(b"".join(digests), DIGEST), return_index=True, return_inverse=True
        )
        numbers = np.full(len(keys), -1, np.int64)
        for run, known in self._runs:
            at = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            hits = run[at] == keys
            numbers[hits] = known[at[hits]]
        fresh = np.flatnonzero(numbers < 0)
        numbers[fresh[np.argsort(first[fresh])]] = np.arange(self.count, self.count + len(fresh))
        if len(fresh):
            self._runs.append((keys[fresh], numbers[fresh].astype(np.int32)))
            self._merge()
        self.count += len(fresh)
        new = np.zeros(len(texts), bool)
        new[first[fresh]] = True
        return numbers[places], new

    def _merge(self) -> None:
        while len(self._runs) > 1 and 2 * len(self._runs[-1][0]) > len(self._runs[-2][0]):
            younger, elder = self._runs.pop(), self._runs.pop()
            keys = np.concatenate((elder[0], younger[0]))
            order = np.argsort(keys, kind="stable")
            self._runs.append((keys[order], np.concatenate((elder[1], younger[1]))[order]))
