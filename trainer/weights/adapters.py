"""Adapters of a run in files, in peft's own layout, and their merge into the weights they were trained on.

    FOLDER/config.json                                        field ``base``: where the weights of a part come from
    FOLDER/adapters/PART/adapter_config.json                  for ``PeftModel.from_pretrained`` of that part
    FOLDER/adapters/PART/adapter_model.safetensors

Files are read without peft. A merge computes what peft's own does, to the bit.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from framestream.pipeline.utils.command_line import printable_line
from framestream.pipeline.utils.records import load_json
from framestream.trainer.model.lora import ADAPTER, is_adapter
from framestream.trainer.weights.tensor_files import LazyTensor, WeightsError, write_shard
from framestream.trainer.weights.tensor_reader import open_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  #: of names in peft's files
MAX_CONFIG_BYTES = 4 << 20  #: of adapter_config.json
#: fields of adapter_config.json with which a layer computes something else than W + alpha / r * B A
OTHER_KINDS = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "use_qalora")


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer: A (r, inputs), B (outputs, r), and the factor of their product."""

    a: LazyTensor
    b: LazyTensor
    scaling: float


def adapter_folder(folder: Path, part: str) -> Path:
    """Return the folder of the adapters of a part."""
    return folder / "adapters" / part


def write_adapters(folder: Path, module: nn.Module, tensors: Mapping[str, torch.Tensor], base: str) -> list[Path]:
    """Write the adapters of a part in peft's layout; return its files.

    Args:
        folder: is created.
        module: the part, with the configuration that peft has put there.
        tensors: values by the names of the part's parameters.
        base: address of the weights that the adapters belong to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in tensors.items()}
    write_shard(folder / WEIGHTS_FILE, renamed)
    config: Any = module.peft_config
    fields = {**config[ADAPTER].to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    fields["target_modules"] = sorted(fields["target_modules"])
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True, default=str), encoding="utf-8")
    return [folder / CONFIG_FILE, folder / WEIGHTS_FILE]


def open_adapters(folder: Path) -> dict[str, LayerAdapter]:
    """Open the adapters in ``folder`` by the name of their layer.

    Raises:
        WeightsError: they are damaged, or of another kind than LoRA of linear layers.
    """
    scaling = _read_scaling(folder / CONFIG_FILE)
    tensors = open_tensors(folder / WEIGHTS_FILE)
    named = {name.removeprefix(PREFIX).removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    layers = sorted({name.rpartition(".")[0] for name in named if name.endswith((".lora_A", ".lora_B"))})
    found = {}
    for layer in layers:
        a, b = named.pop(f"{layer}.lora_A", None), named.pop(f"{layer}.lora_B", None)
        if a is None or b is None or not _fit(a, b):
            raise WeightsError(f"{folder}: {printable_line(layer)} has no A and B that fit; copy the adapters again")
        found[layer] = LayerAdapter(a, b, scaling / a.shape[0])
    if named:
        raise WeightsError(f"{folder}: {printable_line(next(iter(named)))} is no adapter of a linear layer")
    return found


def _fit(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are A (r, inputs) and B (outputs, r) of floating-point numbers, r at least 1."""
    shaped = len(a.shape) == 2 and len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0
    return shaped and a.is_float and b.is_float


def _read_scaling(path: Path) -> float:
    """Return ``lora_alpha``, which B A is multiplied with and r divides."""
    try:
        with open(path, "rb") as file:
            fields: Any = load_json(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}); copy the adapters again") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        raise WeightsError(f"{path}: not the configuration of LoRA adapters")
    if other := [name for name in OTHER_KINDS if fields.get(name)]:
        raise WeightsError(f"{path}: {other[0]} is set; merge these adapters with peft")
    alpha = fields.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise WeightsError(f"{path}: lora_alpha is {alpha!r:.40}, not a finite number; copy the adapters again")
    return float(alpha)


def merge_adapters(
    tensors: dict[str, LazyTensor], part: str, adapters: Mapping[str, LayerAdapter], where: Path
) -> dict[str, LazyTensor]:
    """Return the tensors of a part by our names with its adapters merged into them, on demand.

    Raises:
        WeightsError: an adapter belongs to no tensor, or does not have its shape.
    """
    merged = dict(tensors)
    for layer, adapter in adapters.items():
        name = f"{part}.{layer}.weight"
        shape = (adapter.b.shape[0], adapter.a.shape[1])
        if name not in tensors or tensors[name].shape != shape:
            fault = "is not in the model" if name not in tensors else f"is {tensors[name].shape} there, {shape} here"
            raise WeightsError(f"{where}: adapters of another model: {printable_line(name)} {fault}")
        merged[name] = LazyTensor(shape, functools.partial(_read_merged, tensors[name], adapter))
    return merged


def _read_merged(weight: LazyTensor, adapter: LayerAdapter) -> torch.Tensor:
    return merge_layer(weight.read(), adapter.a.read(), adapter.b.read(), adapter.scaling)


def merge_layer(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return ``weight + scaling * B A`` in the dtype of ``weight``.

    The sum is computed in float32, in which peft loads adapters, and rounded once.
    """
    return (weight.float() + (b.float() @ a.float()) * scaling).to(weight.dtype)


def split_adapters(tensors: Mapping[str, LazyTensor], part: str, alpha: float) -> dict[str, LayerAdapter]:
    """Return the adapters among the tensors of a model that is being trained, by the name of their layer."""
    start = f"{part}."
    found = {}
    for name in tensors:
        if name.startswith(start) and is_adapter(name) and ".lora_A." in name:
            a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
            found[name.removeprefix(start).partition(".lora_A.")[0]] = LayerAdapter(a, b, alpha / a.shape[0])
    return found
