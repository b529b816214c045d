"""What a stage trains: freezing, parameter groups and the learning-rate schedule, all from the manifest."""

from __future__ import annotations

import math

import torch
from torch import nn

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.training import PartConfig, TrainConfig
from framestream.trainer.model.parts import PARTS


def freeze(parts: dict[str, nn.Module], train: TrainConfig) -> None:
    """Let gradients flow only into the parts that the manifest trains. Call before DeepSpeed sees the model."""
    for name in PARTS:
        parts[name].requires_grad_(getattr(train, name).train)


def parameter_groups(parts: dict[str, nn.Module], train: TrainConfig) -> list[dict]:
    """One optimiser group for each trained part and kind of parameter.

    Biases and norm weights (one-dimensional parameters) are not decayed. Partitioned ZeRO-3 parameters keep their
    shape in ``ds_shape``.
    """
    groups = []
    for name in PARTS:
        part: PartConfig = getattr(train, name)
        if not part.train:
            continue
        decayed, plain = [], []
        for parameter in parts[name].parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else plain).append(parameter)
        for parameters, decay in ((decayed, part.weight_decay), (plain, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": part.lr, "weight_decay": decay, "part": name})
    return groups


def schedule(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate for optimiser step ``step`` (from 0) of ``steps``.

    Linear warm-up over ``ceil(warmup * steps)`` steps, then half a cosine down to 0, as transformers'
    ``get_cosine_schedule_with_warmup`` computes it.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / max(1, rise)
    progress = (step - rise) / max(1, steps - rise)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, manifest: Manifest) -> dict[str, float]:
    """Set every group's learning rate for optimiser step ``step``; returns the rate of each trained part.

    Rates are a function of the step and the manifest alone, so a resumed run needs no scheduler state.
    """
    factor = schedule(step, steps, manifest.train.warmup)
    rates = {}
    for group in optimizer.param_groups:
        peak = getattr(manifest.train, group["part"]).lr
        group["lr"] = rates[group["part"]] = peak * factor
    return rates
