"""Tensors in files: their published names (``to_hf_name``), and writing in shards.

:mod:`framestream.trainer.weights.tensor_reader` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from framestream.pipeline.config.model import ModelConfig
from framestream.trainer.model.internvideo2 import POS_EMBED_FRAMES

SHARD_BYTES = 5 * 10**9  #: largest file that ``save_weights`` writes
INDEX = "model.safetensors.index.json"

HF_TOWER_PREFIXES = {  #: published prefix of the vision tower, by its type
    "umt": "model.vision_tower.vision_tower.encoder.",
    "internvideo2": "model.vision_tower.vision_tower.",
}
HF_PREFIXES = {  #: our prefix -> published prefix of the other parts; the vision tower's prefix is tried first
    "connector.": "model.mm_projector.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  #: of weights in files
TRAIN_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  #: by the manifest's ``train.dtype``
ENCODER_PREFIXES = (  #: in an encoder's own file; longer ones first
    "vision_tower.vision_tower.encoder.",
    "vision_tower.vision_tower.",
    "vision_tower.encoder.",
    "vision_tower.",
    "vision_encoder.",
    "encoder.",
    "",
)
#: names in files of InternVideo2 that only its own pretraining uses, to compare features with other models'
PRETRAINING_PREFIXES = (
    "clip_projector.",
    "clip_decoder.",
    "final_clip_decoder.",
    "clip_pos_embed",
    "clip_img_pos_embed",
)


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit the model; one line with the file and the names."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: its shape is known, its values are read on demand. Integers are no weights."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    is_float: bool = True


# ---------------------------------------------------------------------------------------------------------- names


def to_hf_name(name: str, tower: str = "umt") -> str:
    """Return the published name of one of our parameters; ``tower`` is the vision tower's type."""
    for ours, published in _prefixes(tower):
        if name.startswith(ours):
            return published + name[len(ours) :]
    raise KeyError(name)


def from_hf_name(name: str, tower: str = "umt") -> str | None:
    """Return our name of a tensor with a published name; None for other names."""
    for ours, published in _prefixes(tower):
        if name.startswith(published):
            return ours + name[len(published) :]
    return None


def _prefixes(tower: str) -> list[tuple[str, str]]:
    """List (ours, published); the first match counts. Another tower's tensors are a vision tower's, too."""
    return [
        ("vision_tower.", HF_TOWER_PREFIXES[tower]),
        ("vision_tower.", HF_TOWER_PREFIXES["internvideo2"]),
        *HF_PREFIXES.items(),
    ]


def map_checkpoint_keys(part: str, keys: list[str], cfg: ModelConfig) -> dict[str, str]:
    """Map the keys of a file of ``part`` to our names; a key that matches nothing maps to itself.

    Accepted files:
        - complete models with published names; tensors of other parts are ignored;
        - an encoder's own file, with any of ``ENCODER_PREFIXES``;
        - ``mm_projector.bin``, with any prefix before ``mm_projector.``;
        - a connector's or an encoder's names without a prefix.
    """
    tower = cfg.vision_tower.type
    names = _map_published(part, keys, tower)
    if not names and part == "connector":
        names = {key: "connector." + key.rpartition("mm_projector.")[2] for key in keys}
    elif not names and part == "vision_tower":
        names = _map_encoder(keys, tower)
    elif not names:
        names = {key: key for key in keys}
    unused = _unused_prefixes(cfg)
    return {key: name for key, name in names.items() if not name.startswith(unused)}


def _map_published(part: str, keys: list[str], tower: str) -> dict[str, str]:
    """Map the keys of a complete model: those of ``part``, and unknown ones to themselves; empty for other files."""
    names = {key: from_hf_name(key, tower) for key in keys}
    if not any(_is_of(part, name) for name in names.values()):
        return {}
    return {key: name or key for key, name in names.items() if not name or _is_of(part, name)}


def _is_of(part: str, name: str | None) -> bool:
    return name is not None and name.startswith(part + ".")


def _map_encoder(keys: list[str], tower: str) -> dict[str, str]:
    """Map the keys of an encoder's own file; there, UMT's last norm is called ``norm``."""
    prefix = next(p for p in ENCODER_PREFIXES if any(key.startswith(p) for key in keys))
    names = {key: key.removeprefix(prefix) for key in keys}
    if tower == "umt":
        names = {key: re.sub(r"^norm\.", "vision_layernorm.", name) for key, name in names.items()}
    return {key: "vision_tower." + name for key, name in names.items()}


def _unused_prefixes(cfg: ModelConfig) -> tuple[str, ...]:
    """List prefixes of names that may be in files, for tensors that the model computes, shares or never runs."""
    computed = tuple(POS_EMBED_FRAMES) if cfg.vision_tower.type == "umt" else PRETRAINING_PREFIXES
    in_tower = tuple("vision_tower." + name for name in computed)
    last_block = (f"vision_tower.blocks.{cfg.vision_tower.depth - 1}.",)
    tied_head = ("language_model.lm_head.",) if cfg.language_model.tie_word_embeddings else ()
    return in_tower + last_block + tied_head


# -------------------------------------------------------------------------------------------------------- writing


def shard_files(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Distribute tensors over files of at most ``limit`` bytes, in the order of ``sizes`` (bytes).

    Returns:
        file name -> names of its tensors; a tensor larger than ``limit`` has a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one safetensors file with the read permissions of its folder."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it


def write_weight_index(folder: Path, sizes: dict[str, int], limit: int) -> None:
    """Write the index of the files of ``shard_files``, if there is more than one."""
    shards = shard_files(sizes, limit)
    if len(shards) > 1:
        located = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": located}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
