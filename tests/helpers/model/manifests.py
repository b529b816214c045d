"""TODO."""

from __future__ import annotations

from pipeline.config.data import Data, Entry
from pipeline.config.loading import Batching
from pipeline.config.manifest import Manifest
from pipeline.config.model import InitFrom, Model
from pipeline.config.preprocessing import Frames, Text
from pipeline.config.training import Part, Train

TRAINED, FROZEN = Part(train=True, lr=1e-5), Part(train=False)


def manifest(size: int = 224, model: Model | None = None, **train: Part) -> Manifest:
    """Stage 3's settings around a model; parts not named are trained."""
    parts = {name: train.get(name, TRAINED) for name in ("vision_tower", "connector", "language_model")}
    return Manifest(
        stage=3,
        output="run",
        data=Data(entries=(Entry(annotation="a.json"),)),
        frames=Frames(sampler="dynamic_fps1", min=64, max=512, size=size),
        text=Text(tokenizer="tokenizer"),
        batching=Batching(global_batch=256, row_multiple=32),
        train=Train(**parts, dtype="bf16"),
        init_from=InitFrom(run="before"),
        model=model or Model(),
    )
