"""Rows for tests of the model: small random models, dialogues and their packing, independent of the loader."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.training import Recomputation
from framestream.pipeline.loading.batch import Batch, image_and_label_positions
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.weights.load import copy_tensors, random_tensor
from framestream.trainer.weights.tensor_files import LazyTensor

SIZE = 128
SMALL = ModelConfig(
    vision_tower=VisionTowerConfig(width=48, depth=3, heads=4, patch=16, table_side=8, group_tokens=512),
    language_model=LanguageModelConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        rms_norm_eps=1e-6,
    ),
)

INTERNVIDEO2 = dataclasses.replace(
    SMALL,
    vision_tower=VisionTowerConfig(
        type="internvideo2", width=48, depth=3, heads=4, patch=16, mlp_ratio=48 / 11, group_tokens=512, drop_path=0.0
    ),
)


def small_model(recompute: bool = False, cfg: ModelConfig = SMALL, scale: float = 8.0, size: int = SIZE) -> VideoLLM:
    """Return a model with initial values ``scale`` times those of training, so that outputs differ clearly."""
    model = VideoLLM(cfg, size, 4, Recomputation(recompute, cfg.language_model.num_hidden_layers * recompute))
    values = {n: random_tensor(n, tuple(p.shape), 0) * (scale if p.ndim > 1 else 1) for n, p in parameters(model)}
    values |= {name: torch.full_like(scale, 0.5) for name, scale in values.items() if ".ls" in name}  # not 1e-5
    tensors = {name: LazyTensor(tuple(value.shape), lambda value=value: value) for name, value in values.items()}
    copy_tensors(model, tensors)
    return model


def parameters(model: VideoLLM) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters())


@dataclass
class Dialogue:
    """Ids with one IMAGE_TOKEN_INDEX for every visual token, labels, and media in order of use."""

    ids: list[int]
    labels: list[int]
    clips: torch.Tensor  # (n, 4, S, S, 3)
    stills: torch.Tensor  # (m, S, S, 3)
    visual: list[tuple[str, int]] = field(default_factory=list)  # ("clip" | "still", token of the dialogue's own)
    weight: float | None = None  # of every labelled place; 1 / labelled places if not given


def no_clips(size: int = SIZE) -> torch.Tensor:
    return torch.zeros(0, 4, size, size, 3, dtype=torch.uint8)


def no_stills(size: int = SIZE) -> torch.Tensor:
    return torch.zeros(0, size, size, 3, dtype=torch.uint8)


def dialogue(seed: int, clips: int = 0, stills: int = 0, text: int = 12, size: int = SIZE) -> Dialogue:
    """Return text with all clips, then all images, at its third position; two of three text tokens have labels."""
    make = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 96, (text,), generator=make).tolist()
    visual = [("clip", i) for i in range(64 * clips)] + [("still", i) for i in range(64 * stills)]
    ids = words[:2] + [IMAGE_TOKEN_INDEX] * len(visual) + words[2:]
    labels = [IGNORE_INDEX if word == IMAGE_TOKEN_INDEX or place % 3 == 0 else word for place, word in enumerate(ids)]

    def pictures(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, size, size, 3), generator=make, dtype=torch.uint8)

    return Dialogue(ids, labels, pictures(clips, 4), pictures(stills), visual)


def pack(dialogues: list[Dialogue], size: int = SIZE) -> Batch:
    """Pack these dialogues into one row; an empty list gives the empty row."""
    clips = torch.cat([d.clips for d in dialogues] or [no_clips(size)])
    stills = torch.cat([d.stills for d in dialogues] or [no_stills(size)])
    index, clips_before, stills_before = [], 0, 0
    for d in dialogues:
        before = {"clip": 64 * clips_before, "still": 64 * (len(clips) + stills_before)}
        index += [before[kind] + token for kind, token in d.visual]
        clips_before, stills_before = clips_before + len(d.clips), stills_before + len(d.stills)
    rows = [(d.ids, [IGNORE_INDEX, *d.labels[1:]], d.weight) for d in dialogues] or [([0], [IGNORE_INDEX], 1.0)]
    weights = []
    for _, labels, weight in rows:
        labelled = sum(label != IGNORE_INDEX for label in labels)
        each = 1 / max(labelled, 1) if weight is None else weight
        weights += [each if label != IGNORE_INDEX else 0.0 for label in labels]
    lengths = [len(ids) for ids, _, _ in rows]
    input_ids = torch.tensor([token for ids, _, _ in rows for token in ids])
    labels = torch.tensor([label for _, labels, _ in rows for label in labels])
    image_positions, label_positions = image_and_label_positions(input_ids, labels)
    return Batch(
        epoch=0,
        step=0,
        micro_step=0,
        num_micro_steps=1,
        is_last=True,
        keys=[f"d{n}" for n in range(len(dialogues))],
        input_ids=input_ids,
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        lengths=lengths,
        image_positions=image_positions,
        label_positions=label_positions,
        token_weight=torch.tensor(weights, dtype=torch.float32),
        total_weight=float(len(dialogues)),
        clips=clips,
        image_tiles=stills,
        visual_index=torch.tensor(index, dtype=torch.int64),
    )
