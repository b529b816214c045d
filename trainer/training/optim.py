"""Freezing, parameter groups and the learning-rate schedule of a stage, all from the manifest."""

from __future__ import annotations

import math

import torch
from torch import nn

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.training import PartConfig, TrainConfig
from framestream.trainer.model.lora import is_adapter
from framestream.trainer.model.parts import PARTS


def freeze(parts: dict[str, nn.Module], train: TrainConfig) -> None:
    """Enable gradients only for the parts, or their adapters, that the manifest trains.

    Call this before DeepSpeed wraps the model.
    """
    for name in PARTS:
        config: PartConfig = getattr(train, name)
        for own, parameter in parts[name].named_parameters():
            parameter.requires_grad_(config.train and (config.lora is None or is_adapter(own)))


def parameter_groups(parts: dict[str, nn.Module], train: TrainConfig) -> list[dict]:
    """Return one optimizer group for each trained part and kind of parameter.

    Biases and norm weights (one-dimensional parameters) have no weight decay. ``ds_shape`` is the full shape of a
    parameter that ZeRO-3 has partitioned.
    """
    groups: list[dict] = []
    for name in PARTS:
        part: PartConfig = getattr(train, name)
        if not part.train:
            continue
        matrices: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for parameter in filter(lambda p: p.requires_grad, parts[name].parameters()):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) > 1 else vectors).append(parameter)
        for parameters, decay in ((matrices, part.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": part.lr, "weight_decay": decay, "part": name})
    return groups


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the peak learning rate for optimizer step ``step`` (from 0) of ``steps``.

    Linear warm-up over ``ceil(warmup * steps)`` steps, then half a cosine down to 0, as in transformers'
    ``get_cosine_schedule_with_warmup``.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, manifest: Manifest) -> dict[str, float]:
    """Set the learning rate of every group for optimizer step ``step``; return the rate of each trained part.

    Rates depend on the step and the manifest only, so a resumed run needs no scheduler state.
    """
    factor = schedule(step, steps, manifest.train.warmup)
    rates = {}
    for group in optimizer.param_groups:
        peak = getattr(manifest.train, group["part"]).lr
        group["lr"] = rates[group["part"]] = peak * factor
    return rates
