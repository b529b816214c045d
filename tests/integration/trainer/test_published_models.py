"""The published models in full size, from their manifests: parameters, tensors in and out, positions, config.json.

Nothing is allocated: models are built on ``meta``, and the checkpoint that is read is made of files without contents.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.trainer.model import cost
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.hf_config import (
    ReleaseConfig,
    build_hf_config,
    describe_tower_mismatch,
    parse_hf_config,
)
from framestream.trainer.weights.load import open_model_tensors
from framestream.trainer.weights.tensor_files import INDEX, WeightsError, to_hf_name
from tests.helpers.model import published_tensors as published
from tests.helpers.model.published_tensors import Shapes
from tests.helpers.paths import ROOT

MANIFESTS = ROOT / "manifests"

#: config.json of Qwen2-7B-Instruct and Qwen2.5-7B-Instruct, as far as it describes the model
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
}
#: of Qwen2.5-7B-Instruct-1M and of Qwen2.5-1.5B-Instruct
QWEN_1M = QWEN_7B | {"max_position_embeddings": 1010000, "rope_theta": 10000000.0, "rms_norm_eps": 1e-05}
QWEN_1_5B = QWEN_7B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
UMT, INTERNVIDEO2 = published.umt(1024, 23), published.internvideo2(1408, 39, 16)


@dataclass(frozen=True)
class Variant:
    """A published model: its last manifest, its parts as published, and the published numbers of parameters."""

    manifest: str
    tower: str
    vision: Shapes
    qwen: dict
    counts: tuple[float, float, float]  #: vision tower, connector, language model

    def shapes(self) -> Shapes:
        width = 1408 if self.tower == "internvideo2" else 1024
        connector = published.connector(width, self.qwen["hidden_size"])
        return self.vision | connector | published.language_model(self.qwen)


VARIANTS = [
    Variant("stage3.yaml", "umt-large", UMT, QWEN_7B, (290e6, 16.5e6, 7.616e9)),
    Variant("stage4.yaml", "umt-hd-large", UMT, QWEN_7B, (290e6, 16.5e6, 7.616e9)),
    Variant("1m/stage3.yaml", "umt-large", UMT, QWEN_1M, (290e6, 16.5e6, 7.616e9)),
    Variant("2b/stage3.yaml", "umt-hd-large", UMT, QWEN_1_5B, (290e6, 3.9e6, 1.544e9)),
    Variant("internvideo2/stage3.yaml", "internvideo2", INTERNVIDEO2, QWEN_7B, (985e6, 17.9e6, 7.616e9)),
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.manifest)


def manifest_of(variant: Variant) -> Manifest:
    return load_manifest(MANIFESTS / variant.manifest)


def tower_type(variant: Variant) -> str:
    return manifest_of(variant).model.vision_tower.type


@each_variant
def test_parameters_are_the_published_number(variant):
    sizes = {name: math.prod(shape) for name, shape in variant.shapes().items()}
    parts = {"vision_tower": "model.vision_tower.", "connector": "model.mm_projector."}
    counted = {part: sum(n for name, n in sizes.items() if name.startswith(start)) for part, start in parts.items()}
    counted["language_model"] = sum(sizes.values()) - sum(counted.values())
    assert cost.count_parameters(manifest_of(variant)) == counted
    for count, stated in zip(counted.values(), variant.counts, strict=True):
        assert count == pytest.approx(stated, rel=0.02 if stated < 10e6 else 0.005)
    if variant.qwen is QWEN_7B and tower_type(variant) == "umt":
        assert sum(counted.values()) == pytest.approx(7.92e9, rel=0.001)


def test_umt_has_303_tensors():
    assert len(UMT) == 303


@each_variant
def test_tensors_are_written_under_the_published_names(variant):
    model = build_model(manifest_of(variant), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    tower = tower_type(variant)
    assert {to_hf_name(n, tower): tuple(p.shape) for n, p in model.named_parameters()} == variant.shapes()


def hollow(folder: Path, shapes: Shapes) -> Path:
    """A released folder in full size: three safetensors files whose contents are a hole, and their index."""
    folder.mkdir()
    names, located = sorted(shapes), {}
    for n in range(3):
        file, header, end = f"model-{n + 1:05d}-of-00003.safetensors", {}, 0
        for name in names[n::3]:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            located[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": located}))
    return folder


@each_variant
def test_tensors_of_the_published_names_are_read(tmp_path, variant):
    made = manifest_of(variant)
    model = build_model(made, device="meta")
    shapes = variant.shapes()
    if variant.qwen["tie_word_embeddings"]:  # some files hold the shared head too
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    found = open_model_tensors(model, hollow(tmp_path / "released", shapes), made.model)
    assert {name: tensor.shape for name, tensor in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    other = next(name for name in shapes if name.endswith("blocks.7.norm2.weight"))
    del shapes["model.mm_projector.mlp.2.bias"]
    wrong = shapes | {other: (5,), "model.layers.28.mlp.up_proj.weight": (3, 3)}
    with pytest.raises(WeightsError) as error:
        open_model_tensors(model, hollow(tmp_path / "wrong", wrong), made.model)
    text = str(error.value)
    assert "\n" not in text and "missing: connector.mlp.2.bias" in text
    assert "unexpected: language_model.model.layers.28.mlp.up_proj.weight" in text
    assert f"wrong shape: vision_tower.blocks.7.norm2.weight is [5], the model's {list(shapes[other])}" in text


@each_variant
def test_positions_and_norms_are_transformers_own(variant):
    ours = build_model(manifest_of(variant), device="meta").language_model
    config = Qwen2Config(**variant.qwen)
    torch.testing.assert_close(ours.model.rotary_emb.inv_freq, Qwen2RotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)
    assert ours.model.norm.variance_epsilon == ours.model.layers[27].input_layernorm.variance_epsilon
    assert ours.model.norm.variance_epsilon == variant.qwen["rms_norm_eps"]
    same = ("max_position_embeddings", "rope_parameters", "num_key_value_heads", "tie_word_embeddings", "layer_types")
    assert all(getattr(ours.config, name) == getattr(config, name) for name in same)


@each_variant
def test_config_json_is_the_published_models(variant):
    made = manifest_of(variant)
    settings = ReleaseConfig(made.model, made.frames, made.images, made.text, "bfloat16")
    assert not describe_tower_mismatch(settings)
    config = build_hf_config(settings, {})
    assert config["mm_vision_tower"] == variant.tower
    assert config["mm_hidden_size"] == (1408 if variant.tower == "internvideo2" else 1024)
    assert {name: config[name] for name in variant.qwen} == variant.qwen
    del config["framestream"]
    model, size, clip_frames = parse_hf_config(config, "config.json")
    tower = replace(made.model.vision_tower, group_tokens=model.vision_tower.group_tokens)
    assert (model, size, clip_frames) == (replace(made.model, vision_tower=tower), made.frames.size, 4)
