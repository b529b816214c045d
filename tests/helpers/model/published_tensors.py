"""The published tensors, name -> shape, listed from their description, independent of the code under test."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

TOWER = "model.vision_tower.vision_tower."
Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def umt(width: int, blocks: int, patch: int = 16) -> Shapes:
    """List the tensors of UMT: 13 for each block and 4 others; q and v have a bias, positions are not saved."""
    encoder = TOWER + "encoder."
    shapes: Shapes = {
        f"{encoder}patch_embed.proj.weight": (width, 3, 1, patch, patch),
        f"{encoder}patch_embed.proj.bias": (width,),
        f"{encoder}vision_layernorm.weight": (width,),
        f"{encoder}vision_layernorm.bias": (width,),
    }
    for n in range(blocks):
        block = f"{encoder}blocks.{n}."
        shapes |= {f"{block}{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.qkv.weight": (3 * width, width)}
        shapes |= {f"{block}attn.{bias}": (width,) for bias in ("q_bias", "v_bias")}
        shapes |= _linear(f"{block}attn.proj", width, width)
        shapes |= _linear(f"{block}mlp.fc1", width, 4 * width) | _linear(f"{block}mlp.fc2", 4 * width, width)
    return shapes


def internvideo2(width: int, blocks: int, side: int, patch: int = 14) -> Shapes:
    """List the tensors of InternVideo2, ``side`` x ``side`` patches a frame: 13 a block, 5 others, no final norm."""
    shapes: Shapes = {
        f"{TOWER}cls_token": (1, 1, width),
        f"{TOWER}pos_embed": (1, 1 + 4 * side**2, width),
        f"{TOWER}img_pos_embed": (1, 1 + side**2, width),
        f"{TOWER}patch_embed.proj.weight": (width, 3, 1, patch, patch),
        f"{TOWER}patch_embed.proj.bias": (width,),
    }
    hidden = width * 48 // 11
    for n in range(blocks):
        block = f"{TOWER}blocks.{n}."
        norms = ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "ls1", "ls2")
        shapes |= {f"{block}{norm}.weight": (width,) for norm in norms}
        shapes |= _linear(f"{block}attn.qkv", width, 3 * width, bias=False) | _linear(f"{block}attn.proj", width, width)
        shapes |= _linear(f"{block}mlp.fc1", width, hidden) | _linear(f"{block}mlp.fc2", hidden, width)
    return shapes


def connector(width: int, hidden: int) -> Shapes:
    """List the tensors of the connector: Linear, GELU, Linear."""
    name = "model.mm_projector.mlp."
    return _linear(f"{name}0", width, hidden) | _linear(f"{name}2", hidden, hidden)


def language_model(config: dict) -> Shapes:
    """List what transformers' own Qwen2 saves for a config.json; a head tied to the embedding is not saved."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
