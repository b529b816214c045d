"""Settings of training and evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from framestream.pipeline.config.schema import ManifestError, spec, suggest_name


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) of the linear layers of a part, trained in place of its weights.

    A layer computes ``W x + alpha / r * B A x``. A has r rows, and B has r columns.
    """

    r: int = field(metadata=spec(low=1, high=65_536, doc="rank of the adapters"))
    alpha: float = field(default=16.0, metadata=spec(low=1e-6, high=1_000_000))
    dropout: float = field(default=0.0, metadata=spec(low=0, high=0.99, doc="of the inputs of the adapters"))
    targets: tuple[str, ...] = field(
        default=(), metadata=spec(doc="names of linear layers, or the ends of these; all linear layers if empty")
    )
    load: str = field(
        default="full",
        metadata=spec(choices=("full", "8bit", "4bit"), doc="how the part's frozen linear layers are in memory"),
    )


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Training of one of the three parts. ``lr`` and ``weight_decay`` have no effect if ``train`` is false.

    With ``lora`` only adapters are trained, and the part's own weights are frozen.
    """

    train: bool
    lr: float = field(default=0.0, metadata=spec(low=0, high=1))
    weight_decay: float = field(default=0.0, metadata=spec(low=0, high=10))
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.train and not self.lr:
            raise ManifestError("lr: a trained part needs a learning rate above 0")
        if self.lora and not self.train:
            fix = "set train: true and a learning rate, which trains only the adapters, or remove lora (lora: null)"
            raise ManifestError(f"lora: with train: false no adapters are trained; {fix}")


class Recomputation(NamedTuple):
    """What the backward pass computes again instead of keeping it (gradient checkpointing)."""

    tower: bool  #: groups of the vision tower
    layers: int  #: number of layers of the language model, counted from the first


NO_RECOMPUTATION = Recomputation(False, 0)
TRACKERS = ("mlflow", "swanlab", "trackio", "wandb")  #: names of ``train.trackers``, which are those of their packages


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization. The defaults are the published values."""

    vision_tower: PartConfig
    connector: PartConfig
    language_model: PartConfig
    epochs: int = field(default=1, metadata=spec(low=1, high=10_000))
    max_steps: int | None = field(
        default=None, metadata=spec(low=1, high=10**9, doc="stop after this many optimizer steps")
    )
    warmup: float = field(
        default=0.03,
        metadata=spec(low=0, high=1, doc="a share of all steps, which train.epochs and train.max_steps decide"),
    )
    beta1: float = field(default=0.9, metadata=spec(low=0, high=0.999999))
    beta2: float = field(default=0.999, metadata=spec(low=0, high=0.999999))
    epsilon: float = field(default=1e-8, metadata=spec(low=1e-20, high=1))
    clip_norm: float = field(default=1.0, metadata=spec(low=0, high=1_000_000))
    dtype: str = field(default="bf16", metadata=spec(choices=("bf16", "fp32")))
    zero_stage: int = field(default=3, metadata=spec(choices=(1, 2, 3)))
    persistence_threshold: int = field(
        default=100_000, metadata=spec(low=0, high=10**12, doc="ZeRO-3: parameters with fewer elements are not sharded")
    )
    offload: str = field(default="none", metadata=spec(choices=("none", "optimizer", "all")))
    gradient_checkpointing: str = field(
        default="all",
        metadata=spec(flags=("none", "all"), doc="none, tower, layers:K, all, or auto: what the backward pass repeats"),
    )
    matmul_precision: str = field(
        default="highest",
        metadata=spec(
            choices=("highest", "high", "medium"),
            doc="float32 products, as torch.set_float32_matmul_precision: high allows TF32, medium bf16 factors",
        ),
    )
    compile: bool = field(
        default=False, metadata=spec(doc="compile norms, rotary positions and activations; the first steps are slow")
    )
    save_every: int = field(default=500, metadata=spec(low=1, high=10**9, doc="optimizer steps between checkpoints"))
    keep_last: int = field(default=2, metadata=spec(low=1, high=10**9, doc="number of checkpoints to keep"))
    log_every: int = field(default=1, metadata=spec(low=1, high=10**9))
    max_not_finite: int = field(
        default=20,
        metadata=spec(low=0, high=10**9, doc="the run stops when more global batches than this are not finite"),
    )
    peak_tflops: float | None = field(
        default=None,
        metadata=spec(
            low=0.001,
            high=1_000_000,
            doc="peak TFLOP/s of the device of a rank, for MFU; known for common GPUs in bf16",
        ),
    )
    profile_step: int | None = field(
        default=None, metadata=spec(low=1, high=10**9, doc="first optimizer step that the torch profiler records")
    )
    profile_steps: int = field(
        default=2, metadata=spec(low=1, high=1000, doc="number of steps that the profiler records")
    )
    timeout_minutes: float = field(
        default=30.0,
        metadata=spec(low=0.1, high=100_000, doc="the run ends when ranks wait for each other longer than this"),
    )
    check_calls: bool = field(
        default=False, metadata=spec(doc="compare the model calls of all ranks after each global batch (debugging)")
    )
    trackers: tuple[str, ...] = field(
        default=(), metadata=spec(doc=f"experiment trackers beside TensorBoard: {', '.join(TRACKERS)}")
    )
    tracker_project: str = field(default="framestream", metadata=spec(doc="project or experiment of the run there"))

    def __post_init__(self) -> None:
        for name in ("vision_tower", "connector", "language_model"):
            lora = getattr(self, name).lora
            if lora and lora.load != "full" and self.zero_stage == 3:
                fix = "set 1 or 2, or lora.load: full"
                raise ManifestError(f"{name}.lora.load: {lora.load} does not work with zero_stage 3; {fix}")
        if self.offload == "all" and self.zero_stage < 3:
            raise ManifestError("offload: all needs zero_stage 3; set that, or offload: optimizer")
        if not re.fullmatch(r"none|tower|layers:\d{1,4}|all|auto", self.gradient_checkpointing, re.ASCII):
            levels = "none, tower, layers:K (K layers of the language model), all or auto"
            raise ManifestError(f"gradient_checkpointing: {self.gradient_checkpointing!r:.60} is not one of {levels}")
        self._check_trackers()

    def _check_trackers(self) -> None:
        for number, name in enumerate(self.trackers):
            fault = f"is not one of {', '.join(TRACKERS)}{suggest_name(name, TRACKERS)}"
            if name == "tensorboard":
                fault = "needs no entry, because RUN/tensorboard is always written; remove it"
            elif name in self.trackers[:number]:
                fault = "is listed twice; list each tracker once"
            if name not in TRACKERS or name in self.trackers[:number]:
                raise ManifestError(f"trackers[{number}]: {name!r:.60} {fault}")
        if not re.fullmatch(r"[\w.-][\w. -]{0,99}", self.tracker_project, re.ASCII):
            rule = "up to 100 letters, digits, spaces and any of . _ -"
            raise ManifestError(f"tracker_project: {self.tracker_project!r:.60} is no name of a project; use {rule}")

    def recomputation(self, num_layers: int) -> Recomputation:
        """Return what ``gradient_checkpointing`` means for a language model of ``num_layers`` layers.

        ``auto`` is everything, until a run has replaced it by what fits into its memory.
        """
        level = self.gradient_checkpointing
        if level == "none":
            return NO_RECOMPUTATION
        layers = {"tower": 0, "all": num_layers, "auto": num_layers}
        return Recomputation(True, layers[level] if level in layers else int(level.removeprefix("layers:")))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scoring of validation dialogues (``split: val``) by greedy generation; while training if ``every`` is set."""

    batch: int = field(default=32, metadata=spec(low=1, high=65_536))
    max_new_tokens: int = field(default=16, metadata=spec(low=1, high=1_000_000))
    every: int = field(
        default=0,
        metadata=spec(low=0, high=10**9, doc="optimizer steps between validations while training; 0: none"),
    )
    questions: int = field(
        default=64, metadata=spec(low=1, high=1_000_000, doc="dialogues of a validation while training, at most")
    )
    best: str = field(
        default="loss",
        metadata=spec(choices=("loss", "accuracy", "likelihood", "miou"), doc="score whose best checkpoint is kept"),
    )
    patience: int = field(
        default=0,
        metadata=spec(low=0, high=1_000_000, doc="validations without a better one after which the run stops; 0: none"),
    )

    def __post_init__(self) -> None:
        if self.patience and not self.every:
            raise ManifestError("patience: nothing is validated; set evaluate.every to a number of steps, or remove it")
