"""InternVideo2 against the published encoder's numbers; drop path, positions and properties of its packed call."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.attention import AttentionSegments
from framestream.trainer.model.internvideo2 import (
    InternVideo2,
    drop_path,
    init_pos_embed,
    interpolate_pos_embed,
    pos_embed_grid,
)
from framestream.trainer.weights.load import random_tensor
from tests.helpers.golden_data import GOLDEN, json_file, present
from tests.helpers.model.golden_model import ATOL, RTOL, normals, weights

FILES = GOLDEN / "internvideo2_vit"
ENTRIES = json_file("internvideo2_vit/cases.json") or []
MODELS = [
    e
    for e in ENTRIES
    if "model" in e and present(f"internvideo2_vit/{e['weights']}", f"internvideo2_vit/{e['outputs']}")
]
RESIZES = [e for e in ENTRIES if present(f"internvideo2_vit/{e.get('position_resize', '')}")]


def build(arguments: dict) -> InternVideo2:
    cfg = VisionTowerConfig(
        type="internvideo2",
        width=arguments["embed_dim"],
        depth=arguments["depth"],
        heads=arguments["num_heads"],
        patch=arguments["patch_size"],
        mlp_ratio=arguments["mlp_ratio"],
        drop_path=arguments["drop_path_rate"],
    )
    return InternVideo2(cfg, arguments["img_size"], arguments["num_frames"]).eval()


def cases():
    return [pytest.param(m, c, id=f"{m['model']}-{c['case']}") for m in MODELS for c in m["cases"]]


@pytest.mark.parametrize(("model", "case"), cases())
def test_golden_internvideo2_outputs(model, case):
    tower = build(model["arguments"])
    tower.load_state_dict(weights(FILES / model["weights"]))
    assert len(tower.blocks) == model["blocks_built"]
    assert tower.blocks[0].mlp.fc1.out_features == model["mlp_hidden"]
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
    np.testing.assert_allclose(out, expected[:, 1:], atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("model", [pytest.param(m, id=m["model"]) for m in MODELS])
def test_golden_internvideo2_start_positions(model):
    outputs = np.load(FILES / model["outputs"])
    for name in ("pos_embed", "img_pos_embed"):
        expected = outputs[f"init_{name}"]
        start = random_tensor(f"vision_tower.{name}", expected.shape, seed=0)
        np.testing.assert_allclose(start, expected, atol=1e-5)


@pytest.mark.parametrize("entry", [pytest.param(e, id=e["position_resize"]) for e in RESIZES])
def test_golden_internvideo2_position_resize(entry):
    outputs = np.load(FILES / entry["position_resize"])
    for name, seed in entry["seeds"].items():
        values = np.random.default_rng(seed).standard_normal(entry["input_shapes"][name]).astype(np.float32)
        frames = 1 if name.startswith("img") else entry["frames"]
        fitted = interpolate_pos_embed(torch.from_numpy(values), frames, entry["to_grid"])
        np.testing.assert_allclose(fitted, outputs[f"{name}_out"], atol=ATOL, rtol=RTOL)


def small_tower(size: int = 112, drop: float = 0.0) -> InternVideo2:
    torch.manual_seed(0)
    cfg = VisionTowerConfig(
        type="internvideo2", width=48, depth=5, heads=4, patch=14, mlp_ratio=48 / 11, drop_path=drop
    )
    tower = InternVideo2(cfg, size)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tower.eval()


@pytest.mark.parametrize("size", [112, 140])
def test_clips_and_stills_together_equal_each_alone(size):
    tower = small_tower(size)
    clips, stills = torch.randn(3, 3, 4, size, size), torch.randn(2, 3, 1, size, size)
    together = tower.encode_patches(clips, stills)
    for n in range(3):
        alone = tower.encode_patches(clips[n : n + 1], stills[:0])[0]
        torch.testing.assert_close(alone, together[0][n : n + 1])
    torch.testing.assert_close(tower.encode_patches(clips[:0], stills)[1], together[1])
    assert together[0].shape == (3, 4 * (size // 14) ** 2, 48) and together[1].shape == (2, (size // 14) ** 2, 48)


def test_a_call_without_clips_gives_their_parameters_zero_gradients():
    tower = small_tower()
    tower.encode_patches(torch.zeros(0, 3, 4, 112, 112), torch.randn(1, 3, 1, 112, 112))[1].sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert tower.pos_embed.grad.abs().max() == 0 < tower.img_pos_embed.grad.abs().max()
    assert tower.cls_token.grad.abs().max() > 0  # the patches attend to it


def test_drop_rises_linearly_and_stops_at_inference():
    tower = small_tower(drop=0.4)
    assert [block.drop for block in tower.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])  # the last, 0.4, is not built
    clips, stills = torch.randn(2, 3, 4, 112, 112), torch.randn(1, 3, 1, 112, 112)
    exact = small_tower().encode_patches(clips, stills)
    for ours, theirs in zip(tower.encode_patches(clips, stills), exact, strict=True):
        assert torch.equal(ours, theirs)
    count = tower.train().num_drop_path_rands
    dropped = [tower.encode_patches(clips, stills, torch.rand(3, count))[0] for _ in range(4)]
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(dropped))
    last = tower.encode_patches(clips, stills, torch.full((3, count), 0.29))
    for ours, theirs in zip(last, exact, strict=True):
        assert not torch.equal(ours, theirs)  # only the last block, whose probability is 0.3
    with pytest.raises(ValueError, match="needs random numbers"):
        tower.encode_patches(clips, stills)


def test_drop_path_leaves_out_whole_clips_and_keeps_the_mean():
    torch.manual_seed(0)
    segments = AttentionSegments.of_runs([(3000, 5), (1000, 2)], torch.device("cpu"))
    out = drop_path(torch.ones(17000, 3), segments, 0.25, torch.rand(4000))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    for part, length in ((out[:15000], 5), (out[15000:], 2)):
        units = part.view(-1, length * 3)
        assert (units == units[:, :1]).all()
        assert (units[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_tables_that_fit_no_clip_are_refused():
    assert pos_embed_grid(1 + 4 * 16**2, 4) == (4, 16)
    assert pos_embed_grid(1 + 8 * 16**2, 4) == (8, 16)
    assert pos_embed_grid(1 + 256, 1) == (1, 16)
    for rows, frames in ((0, 4), (1, 1), (1 + 8 * 64, 1), (256, 1), (1 + 5 * 64, 4)):
        assert pos_embed_grid(rows, frames) is None
    with pytest.raises(ValueError, match="a table of 300 rows"):
        interpolate_pos_embed(torch.zeros(1, 300, 16), 4, 8)


def test_a_table_that_fits_is_kept_bit_for_bit():
    table = init_pos_embed(32, 4, 8)
    assert torch.equal(interpolate_pos_embed(table, 4, 8), table)
    assert interpolate_pos_embed(table.bfloat16(), 4, 10).dtype == torch.bfloat16
