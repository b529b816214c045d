"""Pixels of images and of videos in one tensor, in the order of the marks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from framestream.pipeline.adapters.shared_pixels import check_lengths, merge_pixels, shares_pixels


def features(*items: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Items of (parts, side, level), filled with zeros to the largest one."""
    parts, side = max(item[0] for item in items), max(item[1] for item in items)
    pixels, mask = torch.zeros(len(items), parts, 3, side, side), torch.zeros(len(items), parts, side, side).long()
    for row, (count, size, level) in enumerate(items):
        pixels[row, :count, :, :size, :size] = level
        mask[row, :count, :size, :size] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def test_parts_stand_in_the_order_of_the_marks():
    images, videos = features((2, 4, 1), (1, 2, 2)), features((3, 6, 8), (3, 6, 9))
    merged = merge_pixels(images, videos, [["video", "image"], [], ["image", "video"]])
    pixels, mask = merged["pixel_values"], merged["pixel_attention_mask"]
    assert pixels.shape == (3, 5, 3, 6, 6) and mask.shape == (3, 5, 6, 6) and mask.dtype == torch.int64
    assert pixels[:, :, 0, 0, 0].tolist() == [[8, 8, 8, 1, 1], [0] * 5, [2, 9, 9, 9, 0]]
    assert mask.sum((-1, -2)).tolist() == [[36, 36, 36, 16, 16], [0] * 5, [4, 36, 36, 36, 0]]
    assert ((pixels != 0).all(2) == mask.bool()).all()


def test_processors_with_names_of_their_own_need_no_merging():
    def part(*names: str) -> SimpleNamespace:
        return SimpleNamespace(model_input_names=names)

    made = SimpleNamespace(image_processor=part("pixel_values"), video_processor=part("pixel_values"))
    assert shares_pixels(made)
    made.video_processor = part("pixel_values_videos")
    assert not shares_pixels(made)
    assert not shares_pixels(SimpleNamespace(image_processor=part("pixel_values"))) and not shares_pixels(None)


def test_videos_of_different_lengths_are_refused():
    check_lengths([torch.zeros(4, 2), torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="4 to 9 frames in one batch"):
        check_lengths([torch.zeros(4, 2), torch.zeros(9, 2)])
