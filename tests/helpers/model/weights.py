"""Small models with initial weights on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import InitFromConfig, ModelConfig
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, save_weights
from tests.helpers.corpora import training_corpus
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL


def start(cfg: ModelConfig = SMALL, **sources: str) -> Manifest:
    """Return a small model's manifest whose parts start from these paths; parts without a path start at random."""
    given = {"vision_tower": "random", "language_model": "random", **{k: str(v) for k, v in sources.items()}}
    return dataclasses.replace(manifest(SIZE, cfg), init_from=InitFromConfig(**given), seed=3)


def initialised(settings: Manifest):
    model = build_model(settings)
    initialize(model, settings)
    return model


def write_untrained_run(folder: Path, videos: int) -> Path:
    """Make a corpus with shards and a model that was never trained; return the manifest."""
    path = training_corpus.make(folder, videos=videos)
    settings = load_manifest(path)
    model = initialised(settings)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(30)  # so that answers differ
    save_weights(model, Path(settings.output) / "final", settings)
    return path
