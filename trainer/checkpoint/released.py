"""Published checkpoints, and exports, as sources of another export."""

from __future__ import annotations

from pathlib import Path

from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig, TextConfig
from framestream.pipeline.config.schema import drop_former_fields, from_dict
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE, ReleaseConfig, is_hf_release, parse_hf_config
from framestream.trainer.weights.load import build_meta_model, open_model_tensors, parse_dtype
from framestream.trainer.weights.tensor_files import LazyTensor
from framestream.trainer.weights.tensor_reader import read_config

#: how published checkpoints were trained and are evaluated (arXiv 2501.00574)
PUBLISHED_FRAMES = {"sampler": "dynamic_fps1", "min": 64, "max": 512}


def is_released(folder: Path) -> bool:
    """Return whether a folder is a published checkpoint or an export, and not a run or its final weights."""
    has_config = (folder / "config.json").is_file() and not (folder / "final" / "config.json").is_file()
    return has_config and is_hf_release(read_config(folder))


def open_released(folder: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor], bool]:
    """Open a published checkpoint or an export.

    Returns:
        its settings, its tensors by our names, not yet read, and whether it is of a run here. Then it was trained on
        frames that were stored as JPEGs.

    Raises:
        ManifestError, WeightsError: one line with the file, what is wrong and the fix.
    """
    config, where = read_config(folder), str(folder / "config.json")
    cfg, size, clip_frames = parse_hf_config(config, where)
    own = config.get(NATIVE_MODEL_TYPE)
    if own is not None:
        frames = from_dict(FramesConfig, own.get("frames"), f"{where}: {NATIVE_MODEL_TYPE}.frames")
        stored = drop_former_fields(ImagesConfig, own.get("images"))
        images = from_dict(ImagesConfig, stored, f"{where}: {NATIVE_MODEL_TYPE}.images")
    else:
        frames = FramesConfig(**PUBLISHED_FRAMES, size=size)  # type: ignore[arg-type]
        images = ImagesConfig(mode="square" if config.get("image_aspect_ratio") == "square" else "anyres_nopad")
    longest = config.get("tokenizer_model_max_length", cfg.language_model.max_position_embeddings)
    text = from_dict(TextConfig, {"tokenizer": str(folder.absolute()), "max_tokens": longest}, where)
    dtype = str(parse_dtype(config, where)).removeprefix("torch.")
    model = build_meta_model(cfg, size, clip_frames)
    tensors = open_model_tensors(model, folder, cfg)
    settings = ReleaseConfig(cfg, frames, images, text, dtype)
    return settings, {name: tensors[name] for name, _ in model.named_parameters()}, own is not None
