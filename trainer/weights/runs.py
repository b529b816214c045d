"""Find the folder of weights of a run."""

from __future__ import annotations

from pathlib import Path

from framestream.trainer.weights.tensor_files import WeightsError


def resolve_weights(checkpoint: str | Path) -> Path:
    """Return the folder of weights of a finished run, or ``checkpoint`` itself if that is one.

    Raises:
        WeightsError: there are no weights.
    """
    checkpoint = Path(checkpoint)
    weights = checkpoint if (checkpoint / "config.json").is_file() else checkpoint / "final"
    if not (weights / "config.json").is_file():
        raise WeightsError(f"{checkpoint}: no weights there; name a finished run, or a folder of weights")
    return weights
