"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from framestream.pipeline.config.schema import ManifestError, config_field


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Training of one of the three parts; ``lr`` and ``weight_decay`` do nothing where ``train`` is false."""

    train: bool
    lr: float = config_field(0.0, low=0)
    weight_decay: float = config_field(0.0, low=0)

    def __post_init__(self) -> None:
        if self.train and not self.lr:
            raise ManifestError("lr: a trained part needs a learning rate above 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation; the defaults are the published ones."""

    vision_tower: PartConfig
    connector: PartConfig
    language_model: PartConfig
    epochs: int = config_field(1, low=1)
    max_steps: int | None = config_field(None, low=1, doc="end after this many optimiser steps")
    warmup: float = config_field(0.03, low=0, doc="share of all steps")
    beta1: float = config_field(0.9, low=0)
    beta2: float = config_field(0.999, low=0)
    epsilon: float = config_field(1e-8, low=0)
    clip_norm: float = config_field(1.0, low=0)
    dtype: str = config_field("bf16", choices=("bf16", "fp32"))
    zero_stage: int = config_field(3, choices=(1, 2, 3))
    persistence_threshold: int = config_field(
        100_000, low=0, doc="ZeRO-3: parameters with fewer elements stay whole on every rank"
    )
    offload: str = config_field("none", choices=("none", "optimizer", "all"))
    gradient_checkpointing: bool = True
    save_every: int = config_field(500, low=1, doc="optimiser steps between checkpoints")
    keep_last: int = config_field(2, low=1, doc="checkpoints kept")
    log_every: int = config_field(1, low=1)
    max_not_finite: int = config_field(20, low=0, doc="a run stops when more global batches than this were not finite")
    peak_tflops: float | None = config_field(
        None, low=0.001, doc="of a rank's device, for MFU; known for common GPUs in bf16"
    )
    profile_step: int | None = config_field(None, low=1, doc="the first optimiser step that torch's profiler records")
    profile_steps: int = config_field(2, low=1, doc="how many it records")
    timeout_minutes: float = config_field(
        30.0, low=0.1, doc="ranks that wait for each other longer than this end the run"
    )
    check_calls: bool = config_field(
        False, doc="compare the model calls of all ranks after each global batch (debugging)"
    )

    def __post_init__(self) -> None:
        if self.offload == "all" and self.zero_stage < 3:
            raise ManifestError("offload: all needs zero_stage 3; set that, or offload: optimizer")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scoring of held-out (``split: val``) dialogues by greedy generation."""

    batch: int = config_field(32, low=1)
    max_new_tokens: int = config_field(16, low=1)
