"""Which samples an entry takes: one grammar for annotation files when building and for shards when reading."""

from __future__ import annotations

import numpy as np

from framestream.pipeline.config.data import SAMPLING, SAMPLING_HELP
from framestream.pipeline.config.manifest import ManifestError


def select_subset(strategy: str, n: int, seed: int = 0) -> range | np.ndarray:
    """Positions, ascending, that a sampling strategy takes of ``n`` samples; a range, or int64.

    ``all``; ``first:N`` [0, N), ``first2:N`` [N, 2N), ``first3:N`` [2N, 3N), ``first4:N`` [3N, 4N); ``end:N`` the last
    N; ``random:N`` N different ones drawn with ``seed``. N is a count or ``P%`` of ``n``, rounded up.

    Raises:
        ManifestError: the strategy is none of these.
    """
    match = SAMPLING.fullmatch(strategy)
    if not match:
        raise ManifestError(f"sampling: {strategy!r} is not {SAMPLING_HELP}")
    if strategy == "all":
        return range(n)
    name, number, percent = match.groups()
    count = -(-int(number) * n // 100) if percent else int(number)
    if name == "end":
        return range(max(n - count, 0), n)
    if name == "random":
        drawn = np.random.default_rng(seed).choice(n, size=min(count, n), replace=False)
        return np.sort(drawn)
    part = int(name[len("first") :] or 1)
    return range(min((part - 1) * count, n), min(part * count, n))
