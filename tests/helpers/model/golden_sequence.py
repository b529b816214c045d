"""The golden multimodal sequences: configuration, cases, and their dialogues as rows."""

from __future__ import annotations

import numpy as np
import torch

from framestream.pipeline.media.tiling import best_grid
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.helpers.golden_data import GOLDEN, json_file, present
from tests.helpers.model.golden_model import normals
from tests.helpers.model.rows import Dialogue, no_clips, no_stills

FILES = GOLDEN / "multimodal_sequence"


WHOLE = present(*(f"multimodal_sequence/{name}" for name in ("config.json", "weights.safetensors", "outputs.npz")))


CASES = (json_file("multimodal_sequence/cases.json") or []) if WHOLE else []


CONFIG = json_file("multimodal_sequence/config.json") or {}


def raster(width: int, height: int) -> list[int]:
    """Return tokens of an overview and of width x height tiles of 8 x 8, in raster order of the complete image."""
    tiles = 64 + np.arange(width * height * 64).reshape(height, width, 8, 8)
    return [*range(64), *tiles.transpose(0, 2, 1, 3).reshape(-1).tolist()]


def dialogues(case: dict) -> list[Dialogue]:
    """Return the rows of a case without padding, truncated to the case's limit, with media in order of use."""
    size, limit = CONFIG["vision_tower"]["size"], case["setting_changes"].get("tokenizer_model_max_length", 10**9)
    flat = case["setting_changes"].get("mm_patch_merge_type") == "flat"
    media = iter(zip(case["images"], case["modalities"], case["image_sizes"], strict=True))
    rows = []
    for ids, labels, mask in zip(case["input_ids"], case["labels"], case["attention_mask"], strict=True):
        row = Dialogue([], [], no_clips(size).float(), no_stills(size).float())
        for token, label, seen in zip(ids, labels, mask, strict=True):
            if not seen:
                continue
            if token != IMAGE_TOKEN_INDEX:
                row.ids.append(token)
                row.labels.append(label)
                continue
            visual = take_media(row, *next(media), size, case.get("tile_grid_w_h"), flat)
            row.visual += visual
            row.ids += [IMAGE_TOKEN_INDEX] * len(visual)
            row.labels += [IGNORE_INDEX] * len(visual)
        if IMAGE_TOKEN_INDEX not in ids:  # a text row uses up one dummy image
            assert next(media)[1] == "text"
        kept = row.ids[:limit].count(IMAGE_TOKEN_INDEX)
        row.ids, row.labels, row.visual = row.ids[:limit], row.labels[:limit], row.visual[:kept]
        rows.append(row)
    return rows


def take_media(
    row: Dialogue, image: dict, kind: str, size_w_h: list[int], size: int, grid: list[int] | None, flat: bool
) -> list[tuple[str, int]]:
    """Add one image or video to the row; return the indices of its tokens, in order."""
    pixels = normals(image["seed"], image["shape"], image["sha256"])
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(0)
    pixels = pixels.permute(0, 2, 3, 1)  # (F, S, S, 3)
    if kind == "video":
        first = 64 * len(row.clips)
        row.clips = torch.cat([row.clips, pixels.unflatten(0, (-1, 4))])
        return [("clip", first + i) for i in range(16 * len(pixels))]
    first = 64 * len(row.stills)
    row.stills = torch.cat([row.stills, pixels])
    width, height = best_grid(*size_w_h, size, 6) if len(pixels) > 1 and not flat else (0, 0)
    assert len(pixels) == 1 + width * height and (len(pixels) < 3 or [width, height] == grid)
    return [("still", first + i) for i in raster(width, height)]
