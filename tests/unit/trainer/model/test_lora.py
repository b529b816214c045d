"""Adapters: which layers get them, their parameters and start values, what is trained, and what it costs."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.config.model import ModelConfig
from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.trainer.model import cost
from framestream.trainer.model.lora import adapted_layers, add_adapters, is_adapter
from framestream.trainer.model.memory_estimate import GIB, estimate_memory, fullest_row
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.training.dry_run import describe
from framestream.trainer.training.optim import freeze, parameter_groups
from tests.helpers.model.manifests import FROZEN, TRAINED, manifest
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, dialogue, pack, parameters, small_model
from tests.helpers.paths import ROOT

LORA = LoraConfig(r=4, alpha=8.0)


def adapted(lora: LoraConfig = LORA) -> PartConfig:
    return PartConfig(train=True, lr=1e-3, lora=lora)


def with_adapters(cfg: ModelConfig, **parts: PartConfig):
    """Return a model with adapters, frozen as its manifest says, and the manifest."""
    settings = manifest(SIZE, cfg, **parts)
    model = small_model(cfg=cfg)
    add_adapters(model, settings)
    freeze(model.parts(), settings.train)
    return model, settings


@pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])
def test_adapters_start_without_effect_and_alone_are_trained(cfg):
    batch = pack([dialogue(0, clips=2, stills=1, text=20)])
    expected = small_model(cfg=cfg)(batch)
    model, settings = with_adapters(cfg, vision_tower=adapted(), connector=adapted(), language_model=adapted())
    loss = model(batch)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    loss.backward()
    trained = {name: p for name, p in parameters(model) if p.requires_grad}
    assert all(is_adapter(name) and p.grad is not None for name, p in trained.items())
    counted = cost.count_trained(settings)
    for part in PARTS:
        own = [p for name, p in trained.items() if name.startswith(part)]
        assert sum(p.numel() for p in own) == counted[part] > 0
    groups = parameter_groups(model.parts(), settings.train)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained.values()}


def test_a_rank_above_a_layers_is_refused_before_a_run():
    """The dry run counts adapters so. The narrowest layer of the connector has 48 inputs and 32 outputs."""
    parts = {"vision_tower": FROZEN, "language_model": FROZEN}
    for rank in (32, 33):
        settings = manifest(SIZE, SMALL, connector=adapted(LoraConfig(r=rank)), **parts)
        if rank == 32:
            assert cost.count_trained(settings)["connector"] > 0
            continue
        with pytest.raises(ManifestError, match=r"^train\.connector\.lora\.r: 33 is above .*; set at most 32, or"):
            cost.count_trained(settings)


def test_start_values_are_a_function_of_seed_and_name():
    first, again = (with_adapters(SMALL, language_model=adapted())[0] for _ in range(2))
    values = {name: p for name, p in parameters(first) if ".lora_A." in name}
    for name, p in parameters(again):
        if name in values:
            torch.testing.assert_close(p, values[name], rtol=0, atol=0)
    assert len({p.flatten()[0].item() for p in values.values()}) == len(values)
    bound = max(p.abs().max().item() * p.shape[1] ** 0.5 for p in values.values())
    assert 0.9 < bound <= 1  # peft's kaiming_uniform_ with a = sqrt(5)


def test_targets_choose_layers_by_the_ends_of_their_names():
    model = build_model(manifest(SIZE, SMALL), device="meta")
    lora = dataclasses.replace(LORA, targets=("q_proj", "layers.1.mlp.up_proj"))
    assert list(adapted_layers(model, "language_model", lora)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(adapted_layers(model, "language_model", LORA)) == 2 * 7
    assert list(adapted_layers(model, "connector", LORA)) == ["mlp.0", "mlp.2"]
    for wrong in ("proj_q", "lm_head", "embed_tokens", "", "proj"):
        with pytest.raises(ManifestError, match=r"train\.language_model\.lora\.targets: .* there are down_proj, "):
            adapted_layers(model, "language_model", dataclasses.replace(LORA, targets=(wrong,)))


def test_flops_and_memory_know_adapters():
    parts = {"vision_tower": FROZEN, "connector": FROZEN, "language_model": adapted()}
    model, settings = with_adapters(SMALL, **parts)
    sample = dialogue(0, clips=3, text=40)
    sample.labels = [5] * len(sample.ids)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(pack([sample])).backward()
    assert counter.get_total_flops() == pytest.approx(cost.flops(settings, frames=12, text_tokens=40), rel=0.12)


def learn(steps: int = 30, **parts: PartConfig) -> float:
    """Return the mean loss of three rows after training on them."""
    model, _ = with_adapters(SMALL, **parts)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    rows = [pack([dialogue(number, clips=1, text=20)]) for number in range(3)]
    for _ in range(steps):
        loss = sum(model(row) for row in rows) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_adapters_of_full_rank_learn_as_much_as_all_weights():
    full = learn(**dict.fromkeys(PARTS, TRAINED))
    wide, narrow = (learn(**dict.fromkeys(PARTS, adapted(LoraConfig(r=r, alpha=r)))) for r in (64, 1))
    assert wide < 1.1 * full < narrow


@pytest.mark.parametrize(
    ("name", "load", "others"),
    [("2b/stage3", "full", ()), ("2b/stage3", "4bit", ()), ("stage3", "4bit", ("full", "8bit"))],
)
def test_published_models_are_tuned_in_24_gb(name, load, others):
    """By the estimate, for 64 frames and 1,024 tokens of text, as docs/training.md says."""

    def estimate(part: str) -> tuple[float, str]:
        parts = f"train.language_model={part}", "train.vision_tower={train: false}", "train.zero_stage=2"
        row = "text.max_tokens=2048", "frames={min: 8, max: 64}", "batching={global_batch: 16, row_multiple: 1}"
        settings = load_manifest(
            ROOT / "manifests" / f"{name}.yaml", (*parts, *row, "model.vision_tower.group_tokens=12544")
        )
        total = estimate_memory(settings, fullest_row(settings), world=1).total
        return total / 1e9, describe(settings) if f"load: {load}" in part else ""

    lora = "{{train: true, lr: 1e-4, lora: {{r: 64, load: {}}}}}"
    size, text = estimate(lora.format(load))
    assert size < 24 < estimate("{train: true, lr: 1e-5}")[0]
    assert f"memory  {size * 1e9 / GIB:.1f} GiB on each of 1 ranks" in text
    assert re.search(
        r"language_model .* \d[\d,]+ in adapters trained" + f" on weights in {load}" * (load != "full"), text
    )
    assert all(estimate(lora.format(other))[0] > size for other in others)
