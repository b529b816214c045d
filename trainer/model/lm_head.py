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
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_weight: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits (..., V) of ``hidden`` (..., H), or with labels the loss of a row.

        Args:
            hidden: (L, H) when labels are given.
            labels: int64 (L,), not shifted: position i predicts label i + 1. The first label of every dialogue is
                ``IGNORE_INDEX``, so no dialogue predicts the next one's start.
            token_weight: float32 (L,) weight of the loss at each labelled position.
            positions: int64 (K,), all positions whose next label is not ``IGNORE_INDEX``.

        Returns:
            float32 scalar, sum of token_weight x cross entropy; zero with zero gradients where nothing is labelled.

        Raises:
            ValueError: labels without ``token_weight`` or ``positions``.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        if token_weight is None or positions is None:
            raise ValueError("labels are given without token_weight or positions; give all for a loss, none for logits")
        if len(positions):
            targets, weights = labels[positions + 1], token_weight[positions + 1]
        else:  # position 0 with weight 0: every parameter gets its (zero) gradient on every rank
            positions = targets = labels.new_zeros(1)
            weights = token_weight.new_zeros(1)
        rows = hidden[positions]
        size = max(1, CHUNK_LOGITS // self.weight_rows)
        chunks = zip(rows.split(size), targets.split(size), weights.split(size), strict=True)
        return torch.stack([checkpoint(self._chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    @property
    def weight_rows(self) -> int:
        """V, also while this rank stores only a ZeRO-3 partition of the weight."""
        return getattr(self.weight, "ds_shape", self.weight.shape)[0]

    def _chunk(self, rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = F.linear(rows, self.weight).float()
        return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
