"""Low-rank adapters (LoRA) of the parts of a model, by peft.

    linear layer W   ->   W x + alpha / r * B A dropout(x)        W frozen, A (r, inputs) and B (outputs, r) trained

peft replaces the layers, and its layer calls the one that was there. B starts as zeros, so the model computes what it
did before. A starts as in peft, from random numbers that depend only on the seed and the name of the layer.
"""

from __future__ import annotations

import hashlib
import importlib.util
from typing import Any

import torch
from torch import nn

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.config.training import LoraConfig, TrainConfig
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.quantization import FULL, quantize_layers, silence_bitsandbytes
from framestream.trainer.model.video_llm import VideoLLM

ADAPTER = "default"  #: peft's name of the adapters in a model
MAX_NAMED = 8  #: layers that a message names


def adapted_parts(train: TrainConfig) -> dict[str, LoraConfig]:
    """Return the settings of the parts that are trained by adapters."""
    found = {name: getattr(train, name).lora for name in PARTS}
    return {name: settings for name, settings in found.items() if settings is not None}


def adapted_layers(model: VideoLLM, part: str, settings: LoraConfig) -> dict[str, nn.Linear]:
    """Return the linear layers of a part that get adapters, by their name in the part.

    Raises:
        ManifestError: a target names no linear layer of the part.
    """
    layers = {name: layer for name, layer in model.parts()[part].named_modules() if isinstance(layer, nn.Linear)}
    if not settings.targets:
        return layers
    chosen: set[str] = set()
    for target in settings.targets:
        found = {name for name in layers if target and f".{name}".endswith(f".{target}")}
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in layers})
            listed = ", ".join(ends[:MAX_NAMED])
            where = f"train.{part}.lora.targets"
            raise ManifestError(f"{where}: {target!r:.60} names no linear layer of the {part}; there are {listed}")
        chosen |= found
    return {name: layer for name, layer in layers.items() if name in chosen}


def check_adapters(model: VideoLLM, train: TrainConfig) -> None:
    """Check what adapters need before a model is built.

    Raises:
        ManifestError: a target names no layer, a layer is smaller than the rank, or peft is not installed.
    """
    for part, settings in adapted_parts(train).items():
        _check_rank(adapted_layers(model, part, settings), part, settings)
        if importlib.util.find_spec("peft") is None:
            raise ManifestError(f"train.{part}.lora: needs the package peft: pip install -e '.[lora]'")


def _check_rank(layers: dict[str, nn.Linear], part: str, settings: LoraConfig) -> None:
    """Check that adapters have no higher rank than their layers: more of it would learn nothing more.

    Raises:
        ManifestError: names the smallest layer.
    """
    name = min(layers, key=lambda name: min(layers[name].weight.shape))
    outputs, inputs = layers[name].weight.shape
    if settings.r > min(outputs, inputs):
        fix = f"set at most {min(outputs, inputs)}, or leave it out of targets"
        where = f"train.{part}.lora.r: {settings.r} is above the rank of {name}"
        raise ManifestError(f"{where}, {inputs} inputs and {outputs} outputs; {fix}")


def count_adapter_parameters(model: VideoLLM, part: str, settings: LoraConfig) -> int:
    """Count the parameters of the adapters of a part.

    Raises:
        ManifestError: a target names no layer, or a layer is smaller than the rank.
    """
    layers = adapted_layers(model, part, settings)
    _check_rank(layers, part, settings)
    return sum(settings.r * (layer.in_features + layer.out_features) for layer in layers.values())


def quantize_parts(model: VideoLLM, train: TrainConfig) -> None:
    """Quantize the linear layers of the parts whose ``lora.load`` says so. Call this before :func:`add_adapters`."""
    for part, settings in adapted_parts(train).items():
        if settings.load != FULL:
            quantize_layers(model.parts()[part], settings.load)


def add_adapters(model: VideoLLM, manifest: Manifest) -> None:
    """Add the adapters of ``manifest.train`` to a model with its initial weights, in the dtype of these.

    Under ZeRO-3 the layers may be partitioned already. The adapters are not: DeepSpeed partitions them when it wraps
    the model. :func:`framestream.trainer.training.optim.freeze` freezes everything else.
    """
    for part, settings in adapted_parts(manifest.train).items():
        silence_bitsandbytes()  # which peft imports where it is installed
        from peft import inject_adapter_in_model  # an extra

        module = model.parts()[part]
        dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        inject_adapter_in_model(peft_config(model, part, settings), module, ADAPTER)
        for name, parameter in module.named_parameters():
            if is_adapter(name):
                start = start_value(f"{part}.{name}", parameter.shape, manifest.seed)
                parameter.data = start.to(parameter.device, dtype)
    if any(settings.dropout for settings in adapted_parts(manifest.train).values()):
        model.keep_random_numbers()


def peft_config(model: VideoLLM, part: str, settings: LoraConfig) -> Any:
    """Return peft's configuration of the adapters of a part."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft computes with any number
        lora_dropout=settings.dropout,
        target_modules=list(adapted_layers(model, part, settings)),
        bias="none",
    )


def is_adapter(name: str) -> bool:
    """Return whether a parameter with this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def start_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Compute the float32 start value of A or B, a function of the seed, the name and the shape.

    B is zero. A is uniform within 1 / sqrt(inputs), as peft's ``kaiming_uniform_`` with a = sqrt(5) has it.
    """
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
