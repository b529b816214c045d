"""Frozen weights of linear layers in 4 or 8 bits, by bitsandbytes (QLoRA, arXiv 2305.14314).

    4bit   blocks of 64 NF4 values with a scale of 8 bits each, and a float32 scale for each 256 of those
    8bit   rows of int8 with a float32 scale each

A layer dequantizes its weights in every call, so a product needs one matrix in 16 or 32 bits at a time. Embeddings, the
head and layers that are called with a bias of their own (UMT's ``qkv``) keep their dtype. Gradients pass through to
adapters; the weights themselves never change.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from framestream.pipeline.utils.command_line import printable_line
from framestream.trainer.model.language_model import RowLinear

FULL = "full"  #: value of ``lora.load`` for weights in the dtype of the model
WEIGHT_BYTES = {"4bit": 0.5 + (1 + 4 / 256) / 64, "8bit": 1.0}  #: of a weight, scales of blocks included
OUTLIER = 6.0  #: activations above are multiplied in 16 bits on GPUs, as in LLM.int8() (arXiv 2208.07339)


def silence_bitsandbytes() -> None:
    """Drop its warnings: one for each product of bf16 and 8 bits, and one where a CPU could have other kernels."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quantizable_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a part that can be quantized, by their name in the part.

    Not those with an odd number of inputs, for which bitsandbytes has slow replacements only.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    kinds = (nn.Linear, RowLinear)
    return {name: layer for name, layer in layers.items() if type(layer) in kinds and layer.in_features % 2 == 0}


def quantize_layers(module: nn.Module, load: str) -> None:
    """Replace the linear layers of a part by quantized ones, one after the other, on the device where they are.

    Args:
        module: a part with its initial weights.
        load: ``4bit`` or ``8bit``.
    """
    for name, layer in quantizable_layers(module).items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, _quantize(layer, load))
    setattr(module, f"is_loaded_in_{load}", True)  # peft chooses the class of its layers by this


def _quantize(layer: nn.Linear, load: str) -> nn.Linear:
    silence_bitsandbytes()
    import bitsandbytes as bnb  # an extra

    shape, device = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.device
    quantized: Any
    if load == "4bit":
        quantized = bnb.nn.Linear4bit(*shape, layer.weight.dtype, quant_type="nf4", device="meta")
        weight: Any = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", compress_statistics=True, module=quantized)
        # On some CPUs evaluation would repack the weights, and later training steps would find no gradients.
        quantized.support_avx512bf16_for_cpu = False
    else:
        quantized = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        # quantized on the way from the CPU, and not otherwise
        weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False)
    quantized.weight, quantized.bias = weight.to(device), layer.bias
    # Frozen weights are in no checkpoint, and so are not their scales.
    setattr(quantized, "_save_to_state_dict", functools.partial(nn.Linear._save_to_state_dict, quantized))  # noqa: B010
    return quantized.train(layer.training)


def describe_unusable(load: str, device: torch.device) -> str:
    """Return why weights cannot be in 4 or 8 bits on a device; empty if they can. A small layer is tried."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{load} needs the package bitsandbytes: pip install -e '.[qlora]'"
    try:
        layer = _quantize(nn.Linear(64, 64, device=device), load)
        layer(torch.zeros(1, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # whatever a library without kernels for the device raises
        reason = printable_line(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
        return f"bitsandbytes cannot compute in {load} on {device.type} ({reason}); set it to {FULL}"
    return ""
