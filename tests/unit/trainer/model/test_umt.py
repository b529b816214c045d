"""The vision tower against the published encoder's numbers, and properties of its packed call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.umt import UMT, sinusoid_pos_embed
from tests.helpers.golden_data import GOLDEN, json_file, present
from tests.helpers.model.golden_model import ATOL, RTOL, normals, weights

FILES = GOLDEN / "umt_vit"
MODELS = [
    m for m in json_file("umt_vit/cases.json") or [] if present(f"umt_vit/{m['weights']}", f"umt_vit/{m['outputs']}")
]


def build(arguments: dict) -> UMT:
    cfg = VisionTowerConfig(
        width=arguments["encoder_embed_dim"],
        depth=arguments["encoder_depth"],
        heads=arguments["encoder_num_heads"],
        patch=arguments["patch_size"],
    )
    return UMT(cfg, arguments["img_size"], arguments["num_frames"]).eval()


def cases():
    return [pytest.param(m, c, id=f"{m['model']}-{c['case']}") for m in MODELS for c in m["cases"]]


@pytest.mark.parametrize("model", [pytest.param(m, id=m["model"]) for m in MODELS])
def test_golden_umt_positions(model):
    outputs, tower = np.load(FILES / model["outputs"]), build(model["arguments"])
    np.testing.assert_allclose(tower.clip_positions, outputs["pos_embed_video"][0], atol=1e-5)
    np.testing.assert_allclose(tower.tile_positions, outputs["pos_embed_image"][0], atol=1e-5)


@pytest.mark.parametrize(("model", "case"), cases())
def test_golden_umt_outputs(model, case):
    tower = build(model["arguments"])
    tower.load_state_dict(weights(FILES / model["weights"], "encoder."))
    assert len(tower.blocks) == model["blocks_built"]
    pixels = normals(case["input_seed"], case["input_shape"], case["input_sha256"])
    frames, size = model["arguments"]["num_frames"], model["arguments"]["img_size"]
    empty_clips, empty_stills = torch.zeros(0, 3, frames, size, size), torch.zeros(0, 3, 1, size, size)
    with torch.no_grad():
        out = (
            tower.encode_patches(empty_clips, pixels)[1]
            if case["use_image"]
            else tower.encode_patches(pixels, empty_stills)[0]
        )
    expected = np.load(FILES / model["outputs"])[case["output_key"]]
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=ATOL, rtol=RTOL)


def small_tower(size: int = 128) -> UMT:
    torch.manual_seed(0)
    tower = UMT(VisionTowerConfig(width=48, depth=3, heads=4, patch=16, table_side=8), size)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


@pytest.mark.parametrize("size", [128, 192])
def test_clips_and_stills_together_equal_each_alone(size):
    tower = small_tower(size)
    clips, stills = torch.randn(3, 3, 4, size, size), torch.randn(2, 3, 1, size, size)
    together = tower.encode_patches(clips, stills)
    for n in range(3):
        alone = tower.encode_patches(clips[n : n + 1], stills[:0])[0]
        torch.testing.assert_close(alone, together[0][n : n + 1])
    torch.testing.assert_close(tower.encode_patches(clips[:0], stills)[1], together[1])
    assert together[0].shape == (3, 4 * (size // 16) ** 2, 48) and together[1].shape == (2, (size // 16) ** 2, 48)


def test_patch_projection_equals_the_convolution():
    proj = small_tower().patch_embed.proj
    pictures = torch.randn(2, 3, 128, 128)
    expected = torch.nn.Conv3d.forward(proj, pictures.unsqueeze(2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(proj(pictures), expected, atol=1e-4, rtol=1e-4)


def test_frames_of_a_clip_see_each_other_and_other_clips_do_not():
    tower = small_tower()
    clips = torch.randn(2, 3, 4, 128, 128, requires_grad=True)
    tower.encode_patches(clips, torch.zeros(0, 3, 1, 128, 128))[0][0, -1].sum().backward()
    assert clips.grad[0, :, 0].abs().sum() > 0 and clips.grad[1].abs().sum() == 0


def test_positions_are_neither_trained_nor_saved():
    tower = small_tower()
    assert not [name for name in tower.state_dict() if "positions" in name]
    assert sinusoid_pos_embed(48, 4, 8, 4, 8).shape == (256, 48) == tower.clip_positions.shape
