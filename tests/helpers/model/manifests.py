"""Manifests of small models, by trained parts."""

from __future__ import annotations

from framestream.pipeline.config.data import DataConfig, EntryConfig
from framestream.pipeline.config.loading import BatchingConfig
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig, ModelConfig
from framestream.pipeline.config.preprocessing import FramesConfig, TextConfig
from framestream.pipeline.config.training import PartConfig, TrainConfig

TRAINED, FROZEN = PartConfig(train=True, lr=1e-5), PartConfig(train=False)


def manifest(size: int = 224, model: ModelConfig | None = None, **train: PartConfig) -> Manifest:
    """Return a manifest of stage 3 for a model; parts without settings are trained."""
    parts = {name: train.get(name, TRAINED) for name in ("vision_tower", "connector", "language_model")}
    return Manifest(
        stage=3,
        output="run",
        data=DataConfig(entries=(EntryConfig(annotation="a.json"),)),
        frames=FramesConfig(sampler="dynamic_fps1", min=64, max=512, size=size),
        text=TextConfig(tokenizer="tokenizer"),
        batching=BatchingConfig(global_batch=256, row_multiple=32),
        train=TrainConfig(**parts, dtype="bf16"),
        init_from=InitFromConfig(run="before"),
        model=model or ModelConfig(),
    )
