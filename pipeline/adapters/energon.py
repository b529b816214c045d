"""Cookers for Megatron-Energon: one for each folder of a shard root. The builder writes the folders' ``.nv-meta``.

A task encoder without a decoder passes the members as bytes, so that a cooker decodes only the selected frames::

    class Task(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(media_cooker(frames=8))]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from framestream.pipeline.adapters.frame_selection import FrameChoice, validate_choice
from framestream.pipeline.adapters.sample_members import read_dialogue, read_members
from framestream.pipeline.adapters.types import Dialogue
from framestream.pipeline.utils.arguments import refuse_unknown_arguments

try:
    from megatron.energon import Sample, basic_sample_keys, edataclass, stateless
except ImportError as error:
    raise ImportError(f"framestream.pipeline.adapters.energon: {error}; pip install megatron-energon") from None


@edataclass
class MediaSample(Sample):
    """Energon's sample of a :class:`framestream.pipeline.adapters.Media`, with the dialogues about it alone."""

    frames: torch.Tensor  #: uint8 (T, H, W, 3), RGB; an image has T = 1
    timestamps: torch.Tensor  #: float64 (T,), seconds of each frame in its source
    start: float  #: seconds of the source at which the clip begins
    duration: float  #: seconds of the clip; 0 for an image
    dialogues: list[Dialogue]


@edataclass
class DialogueSample(Sample):
    """Energon's sample of a :class:`framestream.pipeline.adapters.Dialogue`, with the keys of its media.

    The media are samples of the folders ``video`` and ``image``.
    """

    dialogue: Dialogue
    media: list[str]


@refuse_unknown_arguments
def media_cooker(frames: FrameChoice = None) -> Callable[[dict], MediaSample]:
    """Return a cooker for the folders ``video`` and ``image``.

    Args:
        frames: as for :class:`framestream.pipeline.adapters.ShardDataset`.
    """
    validate_choice(frames)
    return stateless(functools.partial(cook_media, frames=frames))


def cook_media(sample: dict[str, Any], *, frames: FrameChoice = None) -> MediaSample:
    """Cook a crude sample of a media item: decode its members.

    Raises:
        SampleError: the members are not those of a media item, or cannot be read.
    """
    decoded = read_members(sample, frames)
    (media,) = decoded.media
    values = {name: getattr(media, name) for name in ("frames", "timestamps", "start", "duration")}
    return MediaSample(**basic_sample_keys(sample), **values, dialogues=decoded.dialogues)


@stateless
def cook_dialogue(sample: dict[str, Any]) -> DialogueSample:
    """Cook a crude sample of the folder ``dialogue``.

    Raises:
        SampleError: the member is not that of a dialogue, or cannot be read.
    """
    dialogue, media = read_dialogue(sample)
    return DialogueSample(**basic_sample_keys(sample), dialogue=dialogue, media=media)
