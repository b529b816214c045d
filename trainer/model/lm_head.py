"""The language model's head: logits for generation, and the weighted loss for training in bounded memory.

The logits of 32,768 positions times 152,064 words would be 20 GB in float32. So only labelled positions go through the
head, in chunks whose logits are recomputed in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**27  #: logits of one chunk: half a GiB in float32


class ChunkedLMHead(nn.Module):
    """Linear head (no bias) that owns the weight (V, H) of ``source``, a linear layer or the embedding it is tied to.

    Only this module's own ``forward`` uses the weight, however many chunks there are. ZeRO-3 gathers it once for each
    call, so ranks with different numbers of labelled positions stay in step.
    """

    def __init__(self, source: nn.Linear | nn.Embedding):
        super().__init__()
        self.weight = source.weight

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute logits (..., V) of ``hidden`` (..., H), or with targets their loss.

        Args:
            hidden: (K, H) when targets are given.
            targets: int64 (K,), the token after each position; at least one.
            weights: float32 (K,), weight of the loss of each.

        Returns:
            float32 scalar, sum of weight x cross entropy.

        Raises:
            ValueError: targets without weights, or none of them.
        """
        if targets is None:
            return F.linear(hidden, self.weight)
        if weights is None or not len(targets):
            raise ValueError("a loss needs the weights of its targets, and at least one target")
        size = max(1, CHUNK_LOGITS // self.weight_rows)
        chunks = zip(hidden.split(size), targets.split(size), weights.split(size), strict=True)
        return torch.stack([checkpoint(self._chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    @property
    def weight_rows(self) -> int:
        """V, also while this rank stores only a ZeRO-3 partition of the weight."""
        return getattr(self.weight, "ds_shape", self.weight.shape)[0]

    def _chunk(self, rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = F.linear(rows, self.weight).float()
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
