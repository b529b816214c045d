"""Assign consecutive ids to unique strings, in first-seen order, with 20 bytes of memory for each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

DIGEST = np.dtype("S16")  #: digest of a string; numpy compares all 16 bytes, as it pads shorter ones with zeros


class UniqueIds:
    """Ids 0, 1, 2 ... for the distinct strings of any number of batches.

    Digests are stored in sorted runs. The last two runs are merged when the newer one is longer than half of the
    other, so there are at most log2(n) runs and each digest is moved at most log2(n) times.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # sorted digests (n,) S16, and their ids (n,) int32
        self.count = 0

    def assign(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the id of each text, int64 (n,), and whether the text is seen for the first time, bool (n,)."""
        digests = [hashlib.blake2b(text.encode(), digest_size=DIGEST.itemsize).digest() for text in texts]
        keys, first, inverse = np.unique(
            np.frombuffer(b"".join(digests), DIGEST), return_index=True, return_inverse=True
        )
        ids = np.full(len(keys), -1, np.int64)
        for run, run_ids in self._runs:
            at = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            hits = run[at] == keys
            ids[hits] = run_ids[at[hits]]
        fresh = np.flatnonzero(ids < 0)
        ids[fresh[np.argsort(first[fresh])]] = np.arange(self.count, self.count + len(fresh))
        if len(fresh):
            self._runs.append((keys[fresh], ids[fresh].astype(np.int32)))
            self._merge()
        self.count += len(fresh)
        is_new = np.zeros(len(texts), bool)
        is_new[first[fresh]] = True
        return ids[inverse], is_new

    def _merge(self) -> None:
        while len(self._runs) > 1 and 2 * len(self._runs[-1][0]) > len(self._runs[-2][0]):
            newer, older = self._runs.pop(), self._runs.pop()
            keys = np.concatenate((older[0], newer[0]))
            order = np.argsort(keys, kind="stable")
            self._runs.append((keys[order], np.concatenate((older[1], newer[1]))[order]))
