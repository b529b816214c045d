"""Modules and rows of full size with random contents, for measurements that need no files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from framestream.pipeline.config.model import TOKENS_PER_CLIP
from framestream.pipeline.loading.batch import Batch, image_and_label_positions
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.trainer.weights.load import gather_parameter

LEARNED = 32  #: labeled tokens of a dialogue
WORDS = 128  #: number of token ids of the text


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


def make_row(size: int, clips: Sequence[int], text: Sequence[int], seed: int = 0, learned: int = LEARNED) -> Batch:
    """Make a row on the CPU: random text, noise frames of ``size`` pixels, labels at the end of each dialogue.

    Args:
        clips: number of clips of each dialogue, after its first token.
        text: number of text tokens of each dialogue, more than ``learned``.
        learned: number of labeled tokens of a dialogue.
    """
    generator = torch.Generator().manual_seed(seed)
    visual = [TOKENS_PER_CLIP * count for count in clips]
    ids, labels = [], []
    for num_visual, num_text in zip(visual, text, strict=True):
        words = torch.randint(0, WORDS, (num_text,), generator=generator)
        ids.append(torch.cat([words[:1], torch.full((num_visual,), IMAGE_TOKEN_INDEX), words[1:]]))
        labels.append(torch.cat([torch.full((len(ids[-1]) - learned,), IGNORE_INDEX), words[-learned:]]))
    lengths = [len(one) for one in ids]
    input_ids, targets = torch.cat(ids), torch.cat(labels)
    image_positions, label_positions = image_and_label_positions(input_ids, targets)
    return Batch(
        epoch=0,
        step=0,
        micro_step=0,
        num_micro_steps=1,
        is_last=True,
        keys=[str(number) for number in range(len(ids))],
        input_ids=input_ids,
        labels=targets,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        lengths=lengths,
        image_positions=image_positions,
        label_positions=label_positions,
        token_weight=torch.full((sum(lengths),), 1 / learned),
        total_weight=float(len(ids)),
        clips=torch.randint(0, 256, (sum(clips), 4, size, size, 3), generator=generator, dtype=torch.uint8),
        image_tiles=torch.zeros(0, size, size, 3, dtype=torch.uint8),
        visual_index=torch.arange(sum(visual)),
    )
