"""Estimate the memory of one rank while it trains, from the manifest and the contents of a row. Nothing is allocated.

A step has four moments at which memory may be fullest. What is kept for the backward pass is largest at the first:

    head        everything that is kept, one chunk of logits, the gradient of the head's weight
    layer       everything that is kept, and one layer of the language model that is computed again
    tower       pixels and merged tokens, and one group of the vision tower that is computed again
    update      nothing that is kept; float32 gradients of one sub-group of DeepSpeed's optimizer

The weights, gradients and moments of the rank, DeepSpeed's buffers and, on a GPU, CUDA and NCCL are there at all of
them. ``python -m benchmarks.model.memory`` compares the estimate with what steps allocate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.config.training import PartConfig
from framestream.trainer.model.cost import (
    count_adapter_inputs,
    count_parameters,
    count_quantized,
    count_trained,
    largest_layer,
    tower_tokens,
)
from framestream.trainer.model.lm_head import CHUNK_LOGITS
from framestream.trainer.model.lora import adapted_parts
from framestream.trainer.model.quantization import WEIGHT_BYTES

GIB = 1024**3
#: values of its width that a tower block saves for each token: inputs of its norms, scales, products and activations
SAVED_VALUES = {"umt": 16, "internvideo2": 22}
#: the same where a norm is not one kernel: on the CPU, and before torch 2.9; InternVideo2 has more norms
SAVED_UNFUSED = {"umt": 16, "internvideo2": 35}
FUSED_NORMS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)
MAX_LIVE = 10**9  #: parameters that ZeRO-3 keeps gathered at once, DeepSpeed's stage3_max_live_parameters
SUB_GROUP = 10**9  #: parameters of a rank that the optimizer updates at once, DeepSpeed's sub_group_size
GPU_CONTEXT = 2 * GIB  #: CUDA's context, and buffers of NCCL


@dataclass(frozen=True)
class RowShape:
    """What a row puts through the model: clips and tiles, all tokens, and tokens with a label."""

    clips: int
    tiles: int
    tokens: int
    labeled: int


def fullest_row(manifest: Manifest) -> RowShape:
    """Return the fullest row that a manifest allows: ``text.max_tokens`` tokens, all of clips, and all with a label.

    Text has more labels than a video and a video more activations than text, so no row needs more than this.
    """
    tokens = manifest.text.max_tokens
    return RowShape(clips=tokens // TOKENS_PER_CLIP, tiles=0, tokens=tokens, labeled=tokens)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank.

    Attributes:
        states: weights, gradients and AdamW's two moments, without what is offloaded.
        gathered: weights that ZeRO-3 has complete for a while.
        buffers: gradients before they are averaged, DeepSpeed's buckets, and on a GPU CUDA and NCCL.
        kept: what the forward pass keeps for the backward pass.
        working: what is computed again, or for the first time, at the fullest moment.
    """

    states: int
    gathered: int
    buffers: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return self.states + self.gathered + self.buffers + self.kept + self.working


def estimate_memory(manifest: Manifest, row: RowShape, world: int, gpu: bool = True) -> MemoryEstimate:
    """Estimate the bytes of one of ``world`` ranks while it trains on a row.

    Args:
        gpu: the rank computes on a GPU: with fused norms, and beside CUDA's context and NCCL.
    """
    train, language = manifest.train, manifest.model.language_model
    size = weight_bytes(manifest)
    states = state_bytes(manifest, world)
    gathered = min(sum(count_parameters(manifest).values()), MAX_LIVE) * size if train.zero_stage == 3 else 0
    head = language.vocab_size * language.hidden_size * size
    layer, buffers = largest_layer(manifest) * size, GPU_CONTEXT if gpu else 0
    if train.zero_stage > 1:
        buffers += layer  # the bucket in which gradients are averaged
    activations = _Activations(manifest, row, size, gpu and FUSED_NORMS)
    full = train.language_model.train and not train.language_model.lora
    head_gradient = 2 * head if full else 0  # and its copy for the reduction
    layer_gradient = layer if full else 0
    dequantized = max((largest for _, largest in count_quantized(manifest).values()), default=0) * size
    moments = [
        (gathered, activations.kept, activations.logits + head_gradient),
        (gathered, activations.kept, activations.layer + layer_gradient + dequantized),
        (gathered, activations.visual, activations.group + dequantized),
        (0, 0, 0 if train.offload != "none" else min(_learned(manifest) // world, SUB_GROUP) * 4),
    ]
    gathered, kept, working = max(moments, key=sum)
    return MemoryEstimate(states, gathered, buffers, kept, working)


def weight_bytes(manifest: Manifest) -> int:
    """Return the bytes of a weight, and of a value of the activations."""
    return 2 if manifest.train.dtype == "bf16" else 4


def stored_bytes(manifest: Manifest) -> int:
    """Compute the bytes of all weights as they are loaded, with those of adapters."""
    size, adapted, learned = weight_bytes(manifest), adapted_parts(manifest.train), count_trained(manifest)
    total = (sum(count_parameters(manifest).values()) + sum(learned[part] for part in adapted)) * size
    for part, (quantized, _) in count_quantized(manifest).items():
        total -= int(quantized * (size - WEIGHT_BYTES[adapted[part].load]))
    return total


def _learned(manifest: Manifest) -> int:
    """Count the trained parameters."""
    return sum(count_trained(manifest).values())


def state_bytes(manifest: Manifest, world: int) -> int:
    """Compute the bytes of weights, gradients and optimizer of one rank, without what is offloaded.

    They are divided by ``world`` from ZeRO stage 3 (weights), 2 (gradients) or 1 (optimizer) on. The optimizer has a
    float32 copy of the weights beside the two moments. From stage 2 on the gradients are float32.
    """
    train, size, learned = manifest.train, weight_bytes(manifest), _learned(manifest)
    states = 0 if train.offload == "all" else stored_bytes(manifest) // (world if train.zero_stage == 3 else 1)
    if train.zero_stage == 1:
        states += learned * size
    elif train.offload == "none":
        states += learned * 4 // world
    return states + (0 if train.offload != "none" else learned * 12 // world)


def _kept_by_adapters(manifest: Manifest, size: int) -> int:
    """Compute the bytes that the adapters of a layer of the language model keep for a token, beyond those of the layer.

    These are the r values between A and B. With dropout, every adapter has a copy of its inputs and a mask, and the
    frozen weights keep no inputs.
    """
    language, lora = manifest.model.language_model, manifest.train.language_model.lora
    if lora is None:
        return 0
    adapters, inputs = (count // language.num_hidden_layers for count in count_adapter_inputs(manifest))
    frozen = (3 * language.hidden_size + language.intermediate_size) * size
    return adapters * lora.r * size + (max(0, inputs * (size + 1) - frozen) if lora.dropout else 0)


def _loads_8bit(part: PartConfig) -> bool:
    return part.lora is not None and part.lora.load == "8bit"


class _Activations:
    """Bytes of a row's activations: what is kept, and what the backward pass works on."""

    def __init__(self, manifest: Manifest, row: RowShape, size: int, fused: bool) -> None:
        train, tower, language = manifest.train, manifest.model.vision_tower, manifest.model.language_model
        recompute = train.recomputation(language.num_hidden_layers)
        patches, spanned = tower_tokens(manifest)
        tile_patches = patches // manifest.frames.clip_frames
        all_patches = row.clips * spanned + row.tiles * (tile_patches + spanned - patches)
        group_patches = min(all_patches, max(tower.group_tokens, spanned))
        merged_tokens = row.clips * TOKENS_PER_CLIP + row.tiles * TOKENS_PER_TILE
        # of this row and of the next one, which is copied meanwhile
        pixels = (row.clips * manifest.frames.clip_frames + row.tiles) * manifest.frames.size**2 * 3
        block = tower.width * (SAVED_VALUES if fused else SAVED_UNFUSED)[tower.type] * size  # of a patch
        blocks = (tower.depth - 1) * block if train.vision_tower.train else block
        state = language.hidden_size * size  # of a token
        saved = (10 * language.hidden_size + 4 * language.intermediate_size) * size + _kept_by_adapters(manifest, size)
        kept_by_layer = row.tokens * saved
        self.visual = 2 * pixels + merged_tokens * (tower.width + 3 * language.hidden_size) * size
        self.group = group_patches * blocks
        if train.vision_tower.train and not recompute.tower:
            self.visual += all_patches * blocks
            self.group = group_patches * block
        gradients = 2 * row.tokens * language.intermediate_size * size  # of a layer's activations
        self.layer = gradients + (kept_by_layer if recompute.layers else 0)
        self.kept = self.visual + row.tokens * state * (recompute.layers + 3)
        self.kept += kept_by_layer * (language.num_hidden_layers - recompute.layers)
        # layers in 8 bits keep their inputs where they are computed again, too
        if _loads_8bit(train.language_model):
            inputs = 3 * language.hidden_size + language.intermediate_size
            self.kept += row.tokens * inputs * size * recompute.layers
        if _loads_8bit(train.vision_tower) and recompute.tower:
            inputs = (3 + int(tower.mlp_ratio)) * tower.width
            self.kept += all_patches * inputs * size * (tower.depth - 1)
        self.logits = min(row.labeled * language.vocab_size, CHUNK_LOGITS) * (2 + 4 + 4)
