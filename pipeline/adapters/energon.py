"""Megatron-Energon: cookers for the folders of a root, whose ``.nv-meta`` the builder writes.

A task encoder takes members as bytes and cooks them, so that only the frames that are shown are decoded::

    class Task(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(media_cooker(frames=8))]
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

from framestream.pipeline.adapters.frame_selection import FrameChoice, validate_choice
from framestream.pipeline.adapters.sample_members import read_members
from framestream.pipeline.adapters.types import Dialogue

try:
    from megatron.energon import Sample, basic_sample_keys, edataclass, stateless
except ImportError as error:
    raise ImportError(f"framestream.pipeline.adapters.energon: {error}; pip install megatron-energon") from None


@edataclass
class MediaSample(Sample):
    """One video or still with the dialogues about it alone; fields as in :class:`framestream.pipeline.adapters.Media`."""

    frames: torch.Tensor  #: uint8 (T, H, W, 3), RGB
    timestamps: torch.Tensor  #: float64 (T,), seconds of the source
    start: float
    duration: float
    dialogues: list[Dialogue]


@edataclass
class DialogueSample(Sample):
    """One conversation, and the keys of its media (in the folders video and image)."""

    dialogue: Dialogue
    media: list[str]


def media_cooker(frames: FrameChoice = None) -> Callable[[dict], MediaSample]:
    """A cooker for the folders ``video`` and ``image``; ``frames`` as for :class:`framestream.pipeline.adapters.ShardDataset`."""
    validate_choice(frames)
    return stateless(functools.partial(cook_media, frames=frames))


def cook_media(sample: dict[str, Any], *, frames: FrameChoice = None) -> MediaSample:
    """A crude sample with its members as bytes, cooked."""
    read = read_members(sample, frames)
    (medium,) = read.media
    values = {name: getattr(medium, name) for name in ("frames", "timestamps", "start", "duration")}
    return MediaSample(**basic_sample_keys(sample), **values, dialogues=read.dialogues)


@stateless
def cook_dialogue(sample: dict[str, Any]) -> DialogueSample:
    """A cooker for the folder ``dialogue``."""
    read = read_members(sample)
    media = json.loads(json.loads(sample["json"])["media"])
    return DialogueSample(**basic_sample_keys(sample), dialogue=read.dialogues[0], media=media)
