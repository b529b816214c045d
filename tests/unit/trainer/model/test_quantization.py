"""Weights in 4 and 8 bits below adapters: what they compute, what learns, their bytes, and where they are refused."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.trainer.model import quantization
from framestream.trainer.model.lora import add_adapters, is_adapter, quantize_parts
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.quantization import (
    WEIGHT_BYTES,
    describe_unusable,
    quantize_layers,
)
from framestream.trainer.training.optim import freeze
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, dialogue, pack, small_model

CPU = torch.device("cpu")


def quantized(load: str, cfg=SMALL, dtype=torch.float32):
    """Return a model whose parts have adapters on weights in 4 or 8 bits."""
    part = PartConfig(train=True, lr=1e-3, lora=LoraConfig(r=4, load=load))
    base = manifest(SIZE, cfg)
    train = dataclasses.replace(base.train, zero_stage=2, **dict.fromkeys(PARTS, part))
    settings = dataclasses.replace(base, train=train)
    model = small_model(cfg=cfg, scale=1.0).to(dtype)
    quantize_parts(model, settings.train)
    add_adapters(model, settings)
    freeze(model.parts(), settings.train)
    return model


@pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])
@pytest.mark.parametrize("load", WEIGHT_BYTES)
def test_adapters_learn_on_weights_that_stay(cfg, load):
    """An evaluation between two steps changes nothing."""
    batch = pack([dialogue(0, clips=2, stills=1, text=20)])
    model = quantized(load, cfg)
    expected = small_model(cfg=cfg, scale=1.0)(batch).item()
    kept = {name: p.data.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in kept.values()} == {torch.float32, {"4bit": torch.uint8, "8bit": torch.int8}[load]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if is_adapter(name))
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            model.eval()(batch)
    assert losses[0] != expected and losses[0] == pytest.approx(expected, rel=0.1)
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in model.named_parameters():
        assert name not in kept or torch.equal(parameter.data, kept[name])


@pytest.mark.parametrize("load", WEIGHT_BYTES)
def test_bytes_are_those_of_the_estimate_and_in_no_checkpoint(load):
    """4-bit weights and their scales, and 8-bit rows."""
    part = nn.Sequential(nn.Linear(1024, 512), nn.LayerNorm(512))
    expected = part(x := torch.randn(3, 1024, generator=torch.Generator().manual_seed(0)))
    quantize_layers(part, load)
    weight = part[0].weight
    stored = [weight.data]
    if load == "4bit":
        state = weight.quant_state
        stored += [state.absmax, state.state2.absmax]
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert size == pytest.approx(1024 * 512 * WEIGHT_BYTES[load], rel=1e-3)
    assert (part(x) - expected).norm() < {"4bit": 0.15, "8bit": 0.02}[load] * expected.norm()
    assert set(part.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_embeddings_head_and_umts_qkv_keep_their_dtype():
    model = quantized("4bit", dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.ndim > 1 and p.dtype == torch.bfloat16}
    kept = {name for name in kept if not is_adapter(name)}
    assert {name.rpartition(".layers.")[2].rpartition(".blocks.")[2] for name in kept} == {
        "vision_tower.patch_embed.proj.weight",
        "0.attn.qkv.base_layer.weight",
        "1.attn.qkv.base_layer.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
    }


def test_what_cannot_be_used_is_said_in_one_line(monkeypatch):
    for load in WEIGHT_BYTES:
        assert describe_unusable(load, CPU) == ""
    monkeypatch.setattr(quantization, "_quantize", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel\nfor it")))
    expected = "bitsandbytes cannot compute in 8bit on cpu (no kernel); set it to full"
    assert describe_unusable("8bit", CPU) == expected
    known = importlib.util.find_spec
    hidden = "bitsandbytes"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == hidden else known(name, *rest))
    assert describe_unusable("4bit", CPU) == "4bit needs the package bitsandbytes: pip install -e '.[qlora]'"
