"""Images and videos of one batch for processors that name both ``pixel_values``, such as that of SmolVLM2.

Their models see a video as images, in the order of the image tokens. Given images and videos at once, such a processor
returns the pixels of the videos only. So the images are processed once more alone, and put where the marks stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

PIXELS, MASK = "pixel_values", "pixel_attention_mask"


def shares_pixels(processor: Any) -> bool:
    """Return whether a processor of transformers gives pixels of images and of videos the same name."""
    parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    return all(part is not None and PIXELS in part.model_input_names for part in parts)


def check_lengths(videos: Sequence[torch.Tensor]) -> None:
    """Raise ValueError if videos differ in frames: the processor would state the largest number for each of them."""
    if len(lengths := sorted({len(video) for video in videos})) > 1:
        raise ValueError(
            f"videos of {lengths[0]} to {lengths[-1]} frames in one batch, and this processor tells the model one "
            f"number of frames for all; choose frames=N, or batches of one video"
        )


def merge_pixels(images: Any, videos: Any, kinds: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
    """Return pixels and masks with a row for each chat, in the order of its marks.

    Args:
        images: features of all images, one row each: pixels float (images, parts, 3, H, W), where an image may have
            several parts, and masks int64 (images, parts, H, W), all 0 for parts that are padding.
        videos: features of all videos, in which parts are frames.
        kinds: ``image`` or ``video`` for each mark of each chat.

    Returns:
        ``pixel_values``, float (chats, parts, 3, H, W), and ``pixel_attention_mask``, int64 (chats, parts, H, W).
        What is added to fill them is 0.
    """
    waiting = {"image": _items(images), "video": _items(videos)}
    merged: dict[str, torch.Tensor] = {}
    taken = [[waiting[kind].pop(0) for kind in chat] for chat in kinds]
    for number, name in enumerate((PIXELS, MASK)):
        rows = [[part for item in chat for part in item[number]] for chat in taken]
        parts = max(len(row) for row in rows)
        height, width = (max(part.shape[axis] for row in rows for part in row) for axis in (-2, -1))
        shape = next(part.shape[:-2] for row in rows for part in row)
        merged[name] = next(part for row in rows for part in row).new_zeros(len(rows), parts, *shape, height, width)
        for place, row in zip(merged[name], rows, strict=True):
            for k, part in enumerate(row):
                place[k] = pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]))
    return merged


def _items(features: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pixels (parts, 3, H, W) and masks (parts, H, W) of each item, without the parts that are padding."""
    pairs = zip(features[PIXELS], features[MASK], strict=True)
    return [(pixels[real], mask[real]) for pixels, mask in pairs for real in [mask.flatten(1).any(1)]]
