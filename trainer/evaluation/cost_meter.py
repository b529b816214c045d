"""Measure seconds and peak memory of prompts by group, such as the number of their frames."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from framestream.trainer.monitoring.device import peak_memory, reset_peak_memory


@dataclass(slots=True)
class Cost:
    """What the prompts of one group took."""

    prompts: int = 0
    seconds: float = 0.0  #: of all prompts and ranks: media, vision tower, language model and answers
    peak_memory: int = 0  #: bytes; of a GPU's allocations or of the process, the most of any rank

    def add(self, prompts: int, seconds: float, peak: int) -> None:
        """Count further prompts."""
        self.prompts, self.seconds = self.prompts + prompts, self.seconds + seconds
        self.peak_memory = max(self.peak_memory, peak)


class CostMeter:
    """Measures batches of prompts of one process on ``device``.

    Attributes:
        costs: by group.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._group = device, ""
        self.costs: dict[str, Cost] = {}

    @contextlib.contextmanager
    def measure(self, group: str, prompts: int) -> Iterator[None]:
        """Count what happens in this context to ``group``; an empty group is not measured."""
        if group and group != self._group:
            reset_peak_memory(self._device)
        self._group, begun = group, time.perf_counter()
        yield
        if group:
            seconds, peak = time.perf_counter() - begun, peak_memory(self._device)
            self.costs.setdefault(group, Cost()).add(prompts, seconds, peak)

    def to_dict(self) -> dict[str, dict]:
        """Return the costs as JSON values."""
        return {group: asdict(cost) for group, cost in self.costs.items()}


def merge_costs(parts: Iterable[dict[str, dict]]) -> dict[str, Cost]:
    """Add up the costs of all ranks, by group."""
    merged: dict[str, Cost] = {}
    for part in parts:
        for group, found in part.items():
            merged.setdefault(group, Cost()).add(found["prompts"], found["seconds"], found["peak_memory"])
    return merged
