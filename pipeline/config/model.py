"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from framestream.pipeline.config.schema import ManifestError, config_field

TOKENS_PER_CLIP = 64  #: 16 tokens for each of a clip's 4 frames

TOKENS_PER_TILE = 64  #: tokens of one tile of a still


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Video transformer; the dimensions' defaults are UMT-L's."""

    type: str = config_field("umt", choices=("umt", "internvideo2"))
    width: int = config_field(1024, low=1)
    depth: int = config_field(24, low=2, doc="blocks of the published encoder; the last one is not run")
    heads: int = config_field(16, low=1)
    patch: int = config_field(16, low=1)
    mlp_ratio: float = 4.0
    table_side: int = config_field(
        14, low=1, doc="umt: patches along a side of the position table before interpolation"
    )
    drop_path: float | None = config_field(
        None, low=0, doc="internvideo2: drop path of the last block; 0.25 if not given"
    )
    group_clips: int = config_field(
        8, low=1, doc="clips or tiles that go through the tower, and are recomputed, at once"
    )

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ManifestError(f"heads: {self.heads} does not divide width ({self.width})")
        if self.type == "umt":
            if self.drop_path:
                raise ManifestError("drop_path: umt has none; leave it out or set type to internvideo2")
            return
        if self.width % 16:
            raise ManifestError(f"width: {self.width} is not a multiple of 16, as internvideo2's positions need")
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", 0.25)
        if self.drop_path >= 1:
            raise ManifestError(f"drop_path: {self.drop_path} is a probability; it must be below 1")


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """ToMe16 MLP: token merging to 16 tokens a frame, then two linear layers."""

    type: str = config_field("tome16_mlp", choices=("tome16_mlp",))


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Qwen2 family; the defaults are Qwen2-7B."""

    hidden_size: int = config_field(3584, low=1)
    intermediate_size: int = config_field(18944, low=1)
    num_hidden_layers: int = config_field(28, low=1)
    num_attention_heads: int = config_field(28, low=1)
    num_key_value_heads: int = config_field(4, low=1)
    vocab_size: int = config_field(152064, low=1)
    max_position_embeddings: int = config_field(32768, low=1)
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
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
    """The architecture; it stands in the manifest so that nothing needs weights to be planned."""

    vision_tower: VisionTowerConfig = VisionTowerConfig()
    connector: ConnectorConfig = ConnectorConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()


@dataclass(frozen=True, kw_only=True)
class InitFromConfig:
    """Where weights come from. ``run`` is an earlier stage; a part named beside it wins.

    Files and folders may lie on the hub: ``hf:OWNER/NAME[@REVISION]:FILE``, ``hf:OWNER/NAME[@REVISION]``.
    """

    run: str = config_field("", doc="the stage that this one continues, by name or folder, or a published checkpoint")
    vision_tower: str = config_field("", doc="encoder file or folder; `random` starts from the seed")
    connector: str = config_field("", doc="mm_projector.bin, folder, or `random`")
    language_model: str = config_field("", doc="Qwen2 folder, hub name, or `random`")
