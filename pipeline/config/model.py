"""Settings of the model architecture and of its initial weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from framestream.pipeline.config.schema import ManifestError, spec

TOKENS_PER_CLIP = 64  #: 16 tokens for each of a clip's 4 frames

TOKENS_PER_TILE = 64  #: tokens of one tile of an image


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Video transformer. The default dimensions are those of UMT-L."""

    type: str = field(default="umt", metadata=spec(choices=("umt", "internvideo2")))
    width: int = field(default=1024, metadata=spec(low=1, high=65_536))
    depth: int = field(
        default=24, metadata=spec(low=2, high=1000, doc="blocks of the published encoder; the last one is not run")
    )
    heads: int = field(default=16, metadata=spec(low=1, high=1024))
    patch: int = field(default=16, metadata=spec(low=1, high=1024))
    mlp_ratio: float = field(default=4.0, metadata=spec(low=0.01, high=100))
    table_side: int = field(
        default=14,
        metadata=spec(low=1, high=1024, doc="umt: patches along a side of the position table before interpolation"),
    )
    drop_path: float | None = field(
        default=None,
        metadata=spec(low=0, high=0.99, doc="internvideo2: drop path rate of the last block; 0.25 if not given"),
    )
    group_tokens: int = field(
        default=25_088,
        metadata=spec(
            low=1,
            high=100_000_000,
            former="group_clips",
            doc="patches that the tower processes, and recomputes, at once; a clip of 4 frames at 224 pixels has 784",
        ),
    )

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ManifestError(f"heads: {self.heads} does not divide width ({self.width})")
        if self.type == "umt":
            if self.drop_path:
                raise ManifestError("drop_path: not supported by umt; remove it or set type to internvideo2")
            return
        if self.width % 16:
            raise ManifestError(f"width: {self.width} is not a multiple of 16, as internvideo2's positions need")
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", 0.25)


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """ToMe16 MLP: token merging to 16 tokens per frame, then two linear layers."""

    type: str = field(default="tome16_mlp", metadata=spec(choices=("tome16_mlp",)))


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Language model of the Qwen2 family. The defaults are those of Qwen2-7B."""

    hidden_size: int = field(default=3584, metadata=spec(low=1, high=1_000_000))
    intermediate_size: int = field(default=18944, metadata=spec(low=1, high=10_000_000))
    num_hidden_layers: int = field(default=28, metadata=spec(low=1, high=1000))
    num_attention_heads: int = field(default=28, metadata=spec(low=1, high=10_000))
    num_key_value_heads: int = field(default=4, metadata=spec(low=1, high=10_000))
    vocab_size: int = field(default=152064, metadata=spec(low=1, high=10_000_000))
    max_position_embeddings: int = field(default=32768, metadata=spec(low=1, high=100_000_000))
    rope_theta: float = field(default=1e6, metadata=spec(low=1, high=1e12))
    rms_norm_eps: float = field(default=1e-6, metadata=spec(low=1e-20, high=1))
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, count in (
            ("num_attention_heads", self.hidden_size),
            ("num_key_value_heads", self.num_attention_heads),
        ):
            if count % getattr(self, name):
                raise ManifestError(f"{name}: {getattr(self, name)} does not divide {count}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture. It is part of the manifest so that a run can be planned without weights."""

    vision_tower: VisionTowerConfig = VisionTowerConfig()
    connector: ConnectorConfig = ConnectorConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()


@dataclass(frozen=True, kw_only=True)
class InitFromConfig:
    """Where initial weights come from. ``run`` is an earlier stage; a part that is named overrides its weights.

    Files and folders may be on the hub: ``hf:OWNER/NAME[@REVISION]:FILE``, ``hf:OWNER/NAME[@REVISION]``.
    """

    run: str = field(
        default="", metadata=spec(path="any", doc="the stage to continue, by name or folder, or a published checkpoint")
    )
    vision_tower: str = field(
        default="", metadata=spec(path="any", doc="encoder file or folder; `random` initializes from the seed")
    )
    connector: str = field(default="", metadata=spec(path="any", doc="mm_projector.bin, folder, or `random`"))
    language_model: str = field(default="", metadata=spec(path="any", doc="Qwen2 folder, hub name, or `random`"))
