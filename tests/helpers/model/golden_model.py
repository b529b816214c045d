"""Inputs of the golden model files: seeded float32 normals, checked by hash, and weights by this project's names."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ATOL = RTOL = 1e-4  #: modules in float32 (golden/README.md)


def normals(seed: int, shape: list[int], sha256: str) -> torch.Tensor:
    """Return float32 ``shape`` from ``default_rng(seed).standard_normal``; its bytes must have the given hash."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    assert hashlib.sha256(values.tobytes()).hexdigest() == sha256
    return torch.from_numpy(values)


def weights(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file whose names start with ``prefix``, by names without it."""
    return {name.removeprefix(prefix): value for name, value in load_file(path).items() if name.startswith(prefix)}
