"""Narrow weights under the published names: the vision encoder's file, and a Qwen2 with its tokenizer."""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.tools.demo.tokenizer import write_tokenizer
from framestream.trainer.weights.load import random_tensor
from tests.helpers.model.published_tensors import TOWER, umt
from tests.helpers.servers.hub_server import Repository

ENCODERS = "OpenGVLab/Video_Encoders_for_Training_VideoChat-Flash"
ENCODER_FILE = "UMT-L_f4_vision.pt"
LANGUAGE_MODEL = "Qwen/Qwen2-7B-Instruct"
SHARD = "8MB"  #: largest file of the language model, so that it has several, like the published one

#: The rehearsed model: UMT-L and Qwen2-7B with fewer and narrower layers. Patches, positions and vocabulary stay.
NARROW = ModelConfig(
    vision_tower=VisionTowerConfig(width=32, depth=2, heads=2),
    language_model=LanguageModelConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    ),
)

#: the same with the vocabulary of the rehearsal's tokenizer, for the tests
SMALLEST = dataclasses.replace(NARROW, language_model=dataclasses.replace(NARROW.language_model, vocab_size=1024))


def narrow_overrides(model: ModelConfig = NARROW) -> list[str]:
    """Return the ``--set`` assignments of width and depth."""
    published, assignments = ModelConfig(), []
    for part in ("vision_tower", "language_model"):
        for name, value in dataclasses.asdict(getattr(model, part)).items():
            if value != getattr(getattr(published, part), name):
                assignments.append(f"model.{part}.{name}={value}")
    return assignments


def encoder_tensors(model: ModelConfig = NARROW) -> dict[str, torch.Tensor]:
    """Return random values of the encoder's own file: all blocks, the last norm as ``norm``, and its positions."""
    tower = model.vision_tower
    shapes = umt(tower.width, tower.depth, tower.patch)
    names = {name: name.removeprefix(TOWER).replace("vision_layernorm", "norm") for name in shapes}
    values = {names[name]: random_tensor(name, shape, 7) for name, shape in shapes.items()}
    return values | {"encoder.pos_embed": torch.zeros(1, 4 * 14 * 14, tower.width)}


def encoder_file(model: ModelConfig = NARROW) -> bytes:
    """Return the bytes of the encoder's file, in bf16."""
    stream = io.BytesIO()
    torch.save({name: value.bfloat16() for name, value in encoder_tensors(model).items()}, stream)
    return stream.getvalue()


def language_model_files(model: ModelConfig = NARROW) -> dict[str, bytes]:
    """Return the files of a Qwen2 repository: config.json, weights in numbered files, tokenizer."""
    torch.manual_seed(7)
    config = Qwen2Config(**dataclasses.asdict(model.language_model))
    qwen = Qwen2ForCausalLM(config).bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        qwen.save_pretrained(folder, max_shard_size=SHARD)
        write_tokenizer(folder)
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (folder / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"README.md": b"A rehearsal.", "LICENSE": b"None."}


def weight_repositories(model: ModelConfig = NARROW) -> dict[str, Repository]:
    """Return the repositories that the published manifests start from."""
    return {
        ENCODERS: Repository({ENCODER_FILE: encoder_file(model), "README.md": b"A rehearsal."}),
        LANGUAGE_MODEL: Repository(language_model_files(model)),
    }
