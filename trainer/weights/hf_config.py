"""config.json of a released checkpoint: written from a manifest's sections, and parsed back into them.

A release's own code builds the tower by its name. So the file states neither depth nor heads, and pixels only in the
sizes of its image grids. The rest is in an additional section, ``framestream``, which other readers ignore. A
config.json without that section is parsed by the tower's published name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from framestream.pipeline.config.model import ConnectorConfig, LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig, TextConfig
from framestream.pipeline.config.schema import ManifestError, drop_former_fields, from_dict, to_dict
from framestream.trainer.weights.architecture_checks import describe_unsupported

HF_ARCHITECTURE = "VideoChatFlashQwenForCausalLM"
HF_MODEL_TYPE = "videochat_flash_qwen"
HF_CODE_MODULE = "modeling_videochat_flash"  #: the release's python file that ``auto_map`` names
NATIVE_MODEL_TYPE = "framestream"  #: ``model_type`` of our own config.json, and the name of our section in a release

#: published towers: name -> pixels along a side of a frame, architecture
HF_TOWERS = {
    "umt-large": (224, VisionTowerConfig()),
    "umt-hd-large": (448, VisionTowerConfig()),
    "internvideo2": (
        224,
        VisionTowerConfig(type="internvideo2", width=1408, depth=40, heads=16, patch=14, mlp_ratio=48 / 11),
    ),
}

#: equal in every release: the connector, how media become tokens, and settings of parts that are off
FIXED_FIELDS: dict[str, Any] = {
    "frame_aspect_ratio": "square",
    "frame_grid_pinpoints": None,
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "llm_compress_layer_list": [8, 16, 24],
    "llm_compress_type": "attention",
    "llm_image_token_ratio_list": [1.0, 0.5, 0.25, 0.125],
    "max_num_pixels": 14745600000,
    "min_slow_num_frames": 4,
    "mm_close_init": False,
    "mm_llm_compress": False,
    "mm_newline_position": "nothing",
    "mm_num_compress_latents": 128,
    "mm_num_compress_query_type": "learnable",
    "mm_pos_num_frames": 8,
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "pos_skipping_range": 4096,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "vision_encode_type": "video_image",
}
#: of these, what decides which numbers the model computes
MODEL_FIELDS = (
    "frame_aspect_ratio",
    "mm_llm_compress",
    "mm_newline_position",
    "mm_use_im_start_end",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "use_mm_proj",
    "vision_encode_type",
)


@dataclass(frozen=True)
class ReleaseConfig:
    """The sections of a manifest that a set of weights needs, and the weights' dtype (``bfloat16``, ``float32``)."""

    model: ModelConfig
    frames: FramesConfig
    images: ImagesConfig
    text: TextConfig
    dtype: str

    @classmethod
    def from_config(cls, config: dict, dtype: str, where: str) -> ReleaseConfig:
        """Read ``framestream``'s own config.json; ``where`` begins every error (ManifestError)."""
        kinds = {"model": ModelConfig, "frames": FramesConfig, "images": ImagesConfig, "text": TextConfig}
        sections: dict[str, Any] = {
            name: from_dict(kind, drop_former_fields(kind, config.get(name)), f"{where}: {name}")
            for name, kind in kinds.items()
        }
        return cls(**sections, dtype=dtype)


# -------------------------------------------------------------------------------------------------------- writing


def tower_name(model: ModelConfig, size: int) -> str:
    """Return the published name of the tower for frames of ``size`` pixels: the largest one that is not larger."""
    sizes = {pixels: name for name, (pixels, tower) in HF_TOWERS.items() if tower.type == model.vision_tower.type}
    return sizes[max((pixels for pixels in sizes if pixels <= size), default=min(sizes))]


def describe_tower_mismatch(settings: ReleaseConfig) -> str:
    """Describe how the tower that the release's own code builds differs from this model's; empty if it does not."""
    pixels, tower = HF_TOWERS[tower_name(settings.model, settings.frames.size)]
    ours, theirs = to_dict(settings.model.vision_tower), to_dict(tower)
    ours["frames.size"], theirs["frames.size"] = settings.frames.size, pixels
    names = [name for name in ours if name not in ("group_tokens", "drop_path")]  # used in training only
    return ", ".join(f"{name} {ours[name]} instead of {theirs[name]}" for name in names if ours[name] != theirs[name])


def build_hf_config(settings: ReleaseConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """Build config.json of the release.

    Args:
        settings: of the weights.
        tokens: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as there are any.
    """
    model, size, images = settings.model, settings.frames.size, settings.images
    grids = [[size * i, size * j] for i in range(1, images.max_grid + 1) for j in range(1, images.max_grid + 1)]
    square = images.mode == "square"
    return {
        "architectures": [HF_ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{HF_CODE_MODULE}.VideoChatFlashQwenConfig",
            "AutoModel": f"{HF_CODE_MODULE}.{HF_ARCHITECTURE}",
        },
        "torch_dtype": settings.dtype,
        **_qwen2(model.language_model),
        **{name: number for name, number in tokens.items() if name != "pad_token_id"},  # as Qwen2's config.json
        **FIXED_FIELDS,
        "image_aspect_ratio": images.mode,
        "image_grid_pinpoints": grids,
        "mm_hidden_size": model.vision_tower.width,
        "mm_local_num_frames": settings.frames.clip_frames,
        "mm_patch_merge_type": "flat" if square else "spatial_nopad",
        "mm_vision_tower": tower_name(model, size),
        "tokenizer_model_max_length": settings.text.max_tokens,
        NATIVE_MODEL_TYPE: {name: to_dict(getattr(settings, name)) for name in ("model", "frames", "images")},
    }


def _qwen2(language: LanguageModelConfig) -> dict[str, Any]:
    """Return Qwen2's keys as transformers wrote them before version 5 (``rope_theta``); later versions read them."""
    return {
        **to_dict(language),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": language.num_hidden_layers,
        "rope_scaling": None,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }


def build_generation_config(tokens: dict[str, int], ends: Sequence[int]) -> dict[str, Any]:
    """Build generation_config.json: greedy, as the published evaluation; each of ``ends`` ends an answer."""
    return {**tokens, "do_sample": False, **({"eos_token_id": list(ends)} if ends else {})}


# -------------------------------------------------------------------------------------------------------- reading


def parse_hf_config(config: dict, where: str) -> tuple[ModelConfig, int, int]:
    """Parse a release's config.json: the model, pixels along a side of a frame, frames of a clip.

    Raises:
        ManifestError: names ``where`` and the field that is missing or describes another model.
    """
    if faults := [*describe_unsupported(config), *_release_faults(config)]:
        raise ManifestError(f"{where}: {', '.join(faults)}; this is another model, and is not computed here")
    if NATIVE_MODEL_TYPE in config:
        own = config[NATIVE_MODEL_TYPE] if isinstance(config[NATIVE_MODEL_TYPE], dict) else {}
        frames = from_dict(FramesConfig, own.get("frames"), f"{where}: {NATIVE_MODEL_TYPE}.frames")
        stored = drop_former_fields(ModelConfig, own.get("model"))
        model: ModelConfig = from_dict(ModelConfig, stored, f"{where}: {NATIVE_MODEL_TYPE}.model")
        for field, value in to_dict(model.language_model).items():
            if config.get(field, value) != value:
                contradiction = f"{config[field]!r:.40}, and {value!r} in {NATIVE_MODEL_TYPE}.model.language_model"
                raise ManifestError(f"{where}: {field}: {contradiction}; correct the wrong one")
        return model, frames.size, frames.clip_frames
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or name not in HF_TOWERS:
        raise ManifestError(f"{where}: mm_vision_tower: {name!r:.60} is not one of {', '.join(HF_TOWERS)}")
    size, tower = HF_TOWERS[name]
    wanted = {
        "mm_hidden_size": tower.width,
        "mm_local_num_frames": 4,
        "mm_projector_type": FIXED_FIELDS["mm_projector_type"],
    }
    for field, value in wanted.items():
        if config.get(field) != value:
            raise ManifestError(f"{where}: {field}: {config.get(field)!r:.60} is not {value!r}; this is another model")
    rope = config.get("rope_parameters") or {}
    known = {"rope_theta": rope.get("rope_theta", 10000.0), "tie_word_embeddings": False, **config}
    fields = to_dict(LanguageModelConfig()).keys()
    if absent := sorted(fields - known.keys()):
        raise ManifestError(f"{where}: {', '.join(absent)}: missing; a release has all of Qwen2's keys")
    language = from_dict(LanguageModelConfig, {field: known[field] for field in fields}, f"{where}: ")
    return ModelConfig(vision_tower=tower, connector=ConnectorConfig(), language_model=language), size, 4


def _release_faults(config: dict) -> list[str]:
    """List the fields of a release's config.json that describe another use of the vision tower than that here."""
    given = {name: config[name] for name in MODEL_FIELDS if name in config}
    return [f"{name} is {value!r:.60}" for name, value in given.items() if value != FIXED_FIELDS[name]]


def is_hf_release(config: dict) -> bool:
    """Return whether config.json is a release's; some published ones have the ``model_type`` qwen2."""
    return config.get("model_type") == HF_MODEL_TYPE or "mm_vision_tower" in config
