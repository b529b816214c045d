"""Modules and rows of full size with random contents, for measurements that need no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from framestream.pipeline.config.model import TOKENS_PER_CLIP
from framestream.pipeline.loading.batch import Batch, image_and_label_positions
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.trainer.weights.load import gather_parameter

LEARNED = 32  #: labeled tokens of a dialogue


def fill_weights(module: nn.Module) -> None:
    """Set random weights on their device: matrices normal with 0.02, norms one, biases zero."""
    for name, parameter in module.named_parameters():
        with gather_parameter(parameter, write=True), torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))


def place_module(device: torch.device, make: Callable[[], nn.Module]) -> Any:
    """Make a module in bf16 on the device, with random weights; constants stay in float32."""
    with torch.device(device):
        module = make()
    constants = {name: buffer.to(device) for name, buffer in module.named_buffers()}
    module.to(device, torch.bfloat16)
    for name, buffer in constants.items():
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, buffer)
    fill_weights(module)
    return module.train()


def make_row(size: int, clips: int, text: int, dialogues: int = 1) -> Batch:
    """Make a row on the CPU: equal dialogues with ``clips`` clips of ``size`` pixels and ``text`` text tokens each."""
    length = text + TOKENS_PER_CLIP * clips
    ids = [5] * (text // 2) + [IMAGE_TOKEN_INDEX] * (TOKENS_PER_CLIP * clips) + [6] * (text - text // 2)
    labels = [IGNORE_INDEX] * (length - LEARNED) + [6] * LEARNED
    input_ids, all_labels = torch.tensor(ids * dialogues), torch.tensor(labels * dialogues)
    image_positions, label_positions = image_and_label_positions(input_ids, all_labels)
    return Batch(
        epoch=0,
        step=0,
        micro_step=0,
        num_micro_steps=1,
        is_last=True,
        keys=[str(n) for n in range(dialogues)],
        input_ids=input_ids,
        labels=all_labels,
        position_ids=torch.arange(length).repeat(dialogues),
        cu_seqlens=torch.arange(0, length * dialogues + 1, length, dtype=torch.int32),
        lengths=[length] * dialogues,
        image_positions=image_positions,
        label_positions=label_positions,
        token_weight=torch.full((length * dialogues,), 1 / LEARNED),
        total_weight=float(dialogues),
        clips=torch.randint(0, 256, (clips * dialogues, 4, size, size, 3), dtype=torch.uint8),
        image_tiles=torch.zeros(0, size, size, 3, dtype=torch.uint8),
        visual_index=torch.arange(TOKENS_PER_CLIP * clips * dialogues),
    )
