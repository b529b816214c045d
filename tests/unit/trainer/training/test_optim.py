"""Freezing, parameter groups and the learning-rate schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from framestream.pipeline.config.training import PartConfig, TrainConfig
from framestream.trainer.training.optim import freeze, parameter_groups, schedule


def parts() -> dict[str, nn.Module]:
    return {
        name: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        for name in ("vision_tower", "connector", "language_model")
    }


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (10, 0.03), (100, 0.03), (333, 0.1), (7, 1.0)])
def test_schedule_is_transformers_cosine(steps: int, warmup: float) -> None:
    import math

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
    for step in range(steps):
        assert schedule(step, steps, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_only_trained_parts_get_gradients_and_groups() -> None:
    model = parts()
    train = TrainConfig(
        vision_tower=PartConfig(train=True, lr=2e-6, weight_decay=0.1),
        connector=PartConfig(train=True, lr=1e-5),
        language_model=PartConfig(train=False, lr=1e-5),
    )
    freeze(model, train)
    groups = parameter_groups(model, train)
    assert {group["part"] for group in groups} == {"vision_tower", "connector"}
    assert not any(p.requires_grad for p in model["language_model"].parameters())
    grouped = [p for group in groups for p in group["params"]]
    trained = [p for module in model.values() for p in module.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trained))
    for group in groups:
        assert group["lr"] == {"vision_tower": 2e-6, "connector": 1e-5}[group["part"]]
        decayed = group["part"] == "vision_tower" and all(p.ndim > 1 for p in group["params"])
        assert group["weight_decay"] == (0.1 if decayed else 0.0)
