"""Subset grammar: which samples of an entry are used, of an annotation file or of finished shards."""

from __future__ import annotations

import numpy as np

from framestream.pipeline.config.data import SAMPLING_PATTERN, check_sampling


def select_subset(strategy: str, n: int, seed: int = 0) -> range | np.ndarray:
    """Select positions out of ``n`` samples by a sampling strategy; ascending, as a range or int64 (k,).

    ``first:N`` is [0, N), ``first2:N`` [N, 2N), ``first3:N`` [2N, 3N) and ``first4:N`` [3N, 4N). ``end:N`` is the last
    N samples. ``random:N`` is N different samples, drawn with ``seed``. N is a count or ``P%`` of ``n``, rounded up.

    Raises:
        ManifestError: the strategy is unknown.
    """
    check_sampling(strategy)
    match = SAMPLING_PATTERN.fullmatch(strategy)
    if not match or strategy == "all":
        return range(n)
    name, number, percent = match.groups()
    count = -(-int(number) * n // 100) if percent else int(number)
    if name == "end":
        return range(max(n - count, 0), n)
    if name == "random":
        return np.sort(np.random.default_rng(seed).choice(n, size=min(count, n), replace=False))
    part = int(name[len("first") :] or 1)
    return range(min((part - 1) * count, n), min(part * count, n))
