"""Estimate what a model costs: parameters and FLOPs, from the manifest alone (nothing is allocated).

FLOPs of a training step, for each token that passes a part (P weights in matrix products, L layers, d channels of
all heads, S tokens that attend to each other):

    forward                 2 P + 4 L d S
    gradient of the inputs  2 P + 4 L d S
    gradient of the weights 2 P + 4 L d S

So the sum is 6 P + 12 L d S where all are needed. A frozen part skips the gradient of its weights. A part with adapters
is frozen and has a backward pass, and its adapters cost 6 P of their own. Its attention has no
weights, so the backward pass of attention is counted in full. A frozen part with nothing trained before it has no
backward pass. Not counted are recomputation under gradient checkpointing, norms, activations, merging and position
tables. Drop path saves nothing, because every branch is computed. S is the full segment, as usual in published figures;
``cost_coefficients`` counts half of causal attention, the part that is computed, because it estimates time. It counts
the last layer and the head at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from framestream.pipeline.config.loading import CostModel
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE, ModelConfig
from framestream.pipeline.config.training import LoraConfig
from framestream.trainer.model.lora import adapted_layers, adapted_parts, count_adapter_parameters
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.quantization import FULL, quantizable_layers
from framestream.trainer.model.video_llm import VideoLLM

CLASS_TOKENS = {"umt": 0, "internvideo2": 1}  #: of a clip or a tile, in addition to its patches


def count_parameters(manifest: Manifest) -> dict[str, int]:
    """Count the parameters of each part; tied embeddings count once."""
    return _parameters(manifest.model, manifest.frames.size, manifest.frames.clip_frames)


@cache
def _parameters(cfg: ModelConfig, size: int, clip_frames: int) -> dict[str, int]:
    model = _build_meta(cfg, size, clip_frames)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}


def count_trained(manifest: Manifest) -> dict[str, int]:
    """Count the trained parameters of each part: all, none, or those of its adapters."""
    counts = count_parameters(manifest) | _adapter_parameters(manifest)
    return {name: counts[name] if getattr(manifest.train, name).train else 0 for name in PARTS}


def _adapter_parameters(manifest: Manifest) -> dict[str, int]:
    shape = manifest.model, manifest.frames.size, manifest.frames.clip_frames
    return {part: _count_adapters(*shape, part, lora) for part, lora in adapted_parts(manifest.train).items()}


@cache
def _count_adapters(cfg: ModelConfig, size: int, clip_frames: int, part: str, lora: LoraConfig) -> int:
    return count_adapter_parameters(_build_meta(cfg, size, clip_frames), part, lora)


def count_adapter_inputs(manifest: Manifest) -> tuple[int, int]:
    """Count the adapters of the language model, and the values that all of them take for a token."""
    lora = manifest.train.language_model.lora
    if lora is None:
        return 0, 0
    model = _build_meta(manifest.model, manifest.frames.size, manifest.frames.clip_frames)
    layers = adapted_layers(model, "language_model", lora).values()
    return len(layers), sum(layer.in_features for layer in layers)


def count_quantized(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Count the weights in 4 or 8 bits of each part that has any: of all its linear layers, and of the largest."""
    shape = manifest.model, manifest.frames.size, manifest.frames.clip_frames
    adapted = adapted_parts(manifest.train)
    return {part: _count_quantizable(*shape, part) for part, lora in adapted.items() if lora.load != FULL}


@cache
def _count_quantizable(cfg: ModelConfig, size: int, clip_frames: int, part: str) -> tuple[int, int]:
    layers = quantizable_layers(_build_meta(cfg, size, clip_frames).parts()[part])
    sizes = [layer.weight.numel() for layer in layers.values()]
    return sum(sizes), max(sizes)


@cache
def _build_meta(cfg: ModelConfig, size: int, clip_frames: int) -> VideoLLM:
    """Build a model without storage, for its names and shapes."""
    with torch.device("meta"):
        return VideoLLM(cfg, size, clip_frames)


def largest_layer(manifest: Manifest) -> int:
    """Count the parameters of the largest block of the vision tower or layer of the language model."""
    tower, language = manifest.model.vision_tower, manifest.model.language_model
    counts = count_parameters(manifest)
    embeddings = language.vocab_size * language.hidden_size * (1 if language.tie_word_embeddings else 2)
    layer = (counts["language_model"] - embeddings) // language.num_hidden_layers
    return max(counts["vision_tower"] // (tower.depth - 1), layer)


def tower_tokens(manifest: Manifest) -> tuple[int, int]:
    """Count the patches of a clip, and the tokens of its attention: patches and the tower's class token, if any."""
    tower = manifest.model.vision_tower
    patches = (manifest.frames.size // tower.patch) ** 2 * manifest.frames.clip_frames
    return patches, patches + CLASS_TOKENS[tower.type]


def _learned_positions(manifest: Manifest) -> int:
    """Count the parameters of the class token and of the position tables, which are added and not multiplied."""
    (patches, tokens), tower = tower_tokens(manifest), manifest.model.vision_tower
    return tower.width * (1 + tokens + patches // manifest.frames.clip_frames + 1) if tower.type != "umt" else 0


@dataclass(frozen=True)
class PartCost:
    """FLOPs of one part: ``token`` for each token, ``pair`` for each pair of tokens that attend to each other."""

    token: float
    pair: float


def part_costs(manifest: Manifest) -> dict[str, PartCost]:
    """Compute the training FLOPs of the three parts by the formula above; class tokens count as tokens of the tower."""
    train, counts = manifest.train, count_parameters(manifest)
    tower, language = manifest.model.vision_tower, manifest.model.language_model
    before_connector = train.vision_tower.train
    before_language_model = before_connector or train.connector.train
    matmul = _matmul_weights(manifest)
    in_tower = counts["vision_tower"] - _learned_positions(manifest)
    adapters = _adapter_parameters(manifest)

    def part(name: str, weights: int, layers: int, width: int, before: bool) -> PartCost:
        full = getattr(train, name).train and name not in adapters
        cost = _part(weights, layers, width, full, before or name in adapters)
        return replace(cost, token=cost.token + 6.0 * adapters.get(name, 0))

    return {
        "vision_tower": part("vision_tower", in_tower, tower.depth - 1, tower.width, False),
        "connector": part("connector", counts["connector"], 0, 0, before_connector),
        "language_model": part(
            "language_model", matmul, language.num_hidden_layers, language.hidden_size, before_language_model
        ),
    }


def _matmul_weights(manifest: Manifest) -> int:
    """Count the weights of the language model in matrix products, including the head's."""
    language = manifest.model.language_model
    # the embedding is looked up, not multiplied; tied, the same matrix is the head and is multiplied once
    embedding = 0 if language.tie_word_embeddings else language.vocab_size * language.hidden_size
    return count_parameters(manifest)["language_model"] - embedding


def _part(weights: int, layers: int, width: int, trained: bool, inputs_need_gradient: bool) -> PartCost:
    backward = trained or inputs_need_gradient
    return PartCost(
        token=2.0 * weights * (1 + backward + trained),
        pair=4.0 * layers * width * (3 if backward else 1),
    )


def flops_by_part(manifest: Manifest, frames: int, text_tokens: int) -> dict[str, float]:
    """Estimate the training FLOPs of one sample by part: ``frames`` frames of video, ``text_tokens`` tokens of text."""
    costs, (_, spanned) = part_costs(manifest), tower_tokens(manifest)
    clips = frames // manifest.frames.clip_frames
    visual = clips * TOKENS_PER_CLIP
    tokens = visual + text_tokens
    return {
        "vision_tower": clips * (costs["vision_tower"].token * spanned + costs["vision_tower"].pair * spanned**2),
        "connector": costs["connector"].token * visual,
        "language_model": costs["language_model"].token * tokens + costs["language_model"].pair * tokens**2,
    }


def flops(manifest: Manifest, frames: int, text_tokens: int) -> float:
    """Estimate the training FLOPs of one sample: ``frames`` frames of video, ``text_tokens`` tokens of text."""
    return sum(flops_by_part(manifest, frames, text_tokens).values())


def row_flops(manifest: Manifest, clips: int, tiles: int, lengths: Sequence[int], learned: int) -> float:
    """Compute the training FLOPs that a row needs, by the formula above: the numerator of MFU.

    Every segment attends to itself alone. Half of causal attention counts, and no gradient of the pixels. Only labelled
    positions go through the head and through what the last layer skips elsewhere. Dummies and recomputation are not
    counted.

    Args:
        clips, tiles: number of units through the vision tower; every tile of an image counts.
        lengths: tokens of each dialogue, including visual tokens.
        learned: number of labelled positions.
    """
    costs, (patches, spanned) = part_costs(manifest), tower_tokens(manifest)
    frame = patches // manifest.frames.clip_frames
    tile_span = frame + spanned - patches
    tower, language = costs["vision_tower"], language_model_cost(manifest)
    return (
        tower.token * (clips * spanned + tiles * tile_span)
        - pixel_gradient(manifest) * (clips * patches + tiles * frame)
        + tower.pair * (clips * spanned**2 + tiles * tile_span**2)
        + costs["connector"].token * (clips * TOKENS_PER_CLIP + tiles * TOKENS_PER_TILE)
        + language.token * sum(lengths)
        + language.pair * sum(length**2 for length in lengths)
        + language.learned * learned
    )


def pixel_gradient(manifest: Manifest) -> float:
    """Count the FLOPs of a patch's gradient of the pixels, which a trained tower's formula has and no run needs."""
    tower = manifest.model.vision_tower
    return 2.0 * 3 * tower.patch**2 * tower.width if manifest.train.vision_tower.train else 0.0


@dataclass(frozen=True)
class LanguageModelCost:
    """Training FLOPs of the language model that a row needs.

    Attributes:
        token: for each token.
        learned: in addition for each labelled position: the last layer's feed-forward network, and the head.
        pair: for each pair of a dialogue's tokens, half of them masked; attention of the last layer is left out.
    """

    token: float
    learned: float
    pair: float


def language_model_cost(manifest: Manifest) -> LanguageModelCost:
    """Compute the FLOPs of the language model, as :func:`row_flops` counts them."""
    whole, cfg = part_costs(manifest)["language_model"], manifest.model.language_model
    own = whole.token - 6.0 * _adapter_parameters(manifest).get("language_model", 0)  # adapters are counted everywhere
    skipped = cfg.hidden_size * (3 * cfg.intermediate_size + cfg.vocab_size)
    learned = own / _matmul_weights(manifest) * skipped
    layers = cfg.num_hidden_layers
    return LanguageModelCost(whole.token - learned, learned, whole.pair / 2 * (layers - 1) / layers)


def cost_coefficients(manifest: Manifest) -> CostModel:
    """Compute the coefficients that balance rows: FLOPs of a patch (with its share of the connector), a token, a pair.

    Patches of a tile count like those of a clip, which overestimates their attention. The cost of a class token is
    divided among the clip's patches.
    """
    costs, (patches, spanned) = part_costs(manifest), tower_tokens(manifest)
    tower, language = costs["vision_tower"], costs["language_model"]
    return CostModel(
        patch=(tower.token * spanned + tower.pair * spanned**2 + costs["connector"].token * TOKENS_PER_CLIP) / patches,
        token=language.token,
        pair=language.pair / 2,
    )
