"""Small models with initial weights on disk."""

from __future__ import annotations

import dataclasses

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig, ModelConfig
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize
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
