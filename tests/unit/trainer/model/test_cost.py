"""Cost formulas against the published figures and against counting products of a real run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from framestream.pipeline.config.model import ModelConfig, VisionTowerConfig
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.model import cost
from tests.helpers.model.manifests import FROZEN, manifest
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, dialogue, pack, small_model

INTERNVIDEO2_1B = VisionTowerConfig(type="internvideo2", width=1408, depth=40, patch=14, mlp_ratio=48 / 11)


def test_published_flops_of_a_512_frame_sample():
    parts = cost.flops_by_part(manifest(), frames=512, text_tokens=256)
    assert parts["vision_tower"] == pytest.approx(197e12, rel=0.002)
    assert parts["language_model"] == pytest.approx(444e12, rel=0.002)
    assert parts["connector"] == pytest.approx(0.8e12, rel=0.05)
    assert parts["vision_tower"] + parts["language_model"] == pytest.approx(641e12, rel=0.002)
    fourth = cost.flops_by_part(manifest(448, language_model=FROZEN), frames=512, text_tokens=256)
    assert fourth["vision_tower"] == pytest.approx(1055e12, rel=0.002)
    assert fourth["language_model"] == pytest.approx(325e12, rel=0.002)
    assert sum(fourth.values()) == pytest.approx(1380e12, rel=0.002)
    other = cost.flops_by_part(manifest(model=ModelConfig(vision_tower=INTERNVIDEO2_1B)), frames=512, text_tokens=256)
    assert other["vision_tower"] == pytest.approx(864e12, rel=0.001)


@pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])
@pytest.mark.parametrize("frozen", [(), ("language_model",), ("vision_tower", "language_model"), ("vision_tower",)])
def test_coefficients_equal_the_products_that_a_step_runs(frozen, cfg):
    """torch's own counter on a real forward and backward pass (attention counted in full, head on every place)."""
    settings = manifest(SIZE, cfg, **dict.fromkeys(frozen, FROZEN))
    model = small_model(cfg=cfg)
    for name in frozen:
        model.parts()[name].requires_grad_(False)
    sample = dialogue(0, clips=3, text=40)
    sample.labels = [5] * len(sample.ids)
    batch = pack([sample])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(batch).backward()
    expected = cost.flops(settings, frames=12, text_tokens=40)
    # the head skips the last place and is recomputed once; merging adds products that the formula leaves out;
    # the first layer of a trained part needs no gradient of its inputs
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])
def test_flops_of_a_row_are_the_products_that_it_runs(cfg):
    """torch's counter on a packed row of all kinds; it counts causal attention whole, and the head's recomputation."""
    model, settings = small_model(cfg=cfg), manifest(SIZE, cfg)
    batch = pack([dialogue(0, clips=3, text=40), dialogue(1, stills=2, text=60), dialogue(2, text=90)])
    lengths, learned = batch.cu_seqlens.diff().tolist(), int((batch.labels != IGNORE_INDEX).sum())
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(batch).backward()
    language = cfg.language_model
    # attention of short segments is computed whole, also that of the last layer
    computed = cost.part_costs(settings)["language_model"].pair - cost.language_model_cost(settings).pair
    masked = computed * sum(length**2 for length in lengths)
    recomputed = 2 * learned * language.vocab_size * language.hidden_size
    expected = cost.row_flops(settings, clips=3, tiles=2, lengths=lengths, learned=learned)
    # what is left is merging, whose products the formula leaves out
    assert counter.get_total_flops() - masked - recomputed == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("tower", [VisionTowerConfig(), INTERNVIDEO2_1B], ids=["umt", "internvideo2"])
def test_coefficients_are_the_same_formula_with_causal_attention(tower):
    settings = manifest(model=ModelConfig(vision_tower=tower))
    coefficients = cost.cost_coefficients(settings)
    patches, tokens = 512 * (224 // tower.patch) ** 2, 8192 + 256
    estimate = coefficients.patch * patches + coefficients.token * tokens + 2 * coefficients.pair * tokens**2
    assert estimate == pytest.approx(cost.flops(settings, 512, 256), rel=1e-9)


def test_freezing_never_costs_more():
    whole = cost.flops(manifest(), 64, 100)
    for names in (["vision_tower"], ["language_model"], ["vision_tower", "language_model"]):
        assert cost.flops(manifest(**dict.fromkeys(names, FROZEN)), 64, 100) < whole
