"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from framestream.pipeline.config.schema import ManifestError, config_field


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """How a video becomes frames, when building and when reading."""

    sampler: str = config_field(doc="middle, dynamic_fps1, rand, or fpsX with X frames a second")
    min: int = config_field(low=1)
    max: int = config_field(low=1)
    size: int = config_field(low=16, doc="pixels of a side of a frame as the model sees it")
    resize: str = config_field(
        "stretch",
        choices=("stretch", "short_side", "long_side"),
        doc="how frames are stored: size x size, or with the aspect kept and the short or long side of size pixels",
    )
    clip_frames: int = config_field(4, choices=(4,), doc="frames of one clip, the unit of the vision tower")
    time_message: str = config_field("short", choices=("short", "long", "none"))
    quality: int = config_field(90, low=1, doc="JPEG quality of stored frames")
    subsampling: str = config_field("420", choices=("420", "422", "444"))

    def __post_init__(self) -> None:
        named = self.sampler in ("middle", "dynamic_fps1", "rand")
        rate = self.sampler[3:] if self.sampler.startswith("fps") else ""
        if not named and not (rate.replace(".", "", 1).isdigit() and float(rate) > 0):
            raise ManifestError(f"sampler: {self.sampler!r} is not middle, dynamic_fps1, rand or fpsX such as fps2")
        if self.resize != "stretch" and self.size % 2:
            raise ManifestError(f"size: {self.size} is odd; {self.resize} needs an even one")
        if self.min > self.max:
            raise ManifestError(f"min: {self.min} is larger than max ({self.max})")
        if self.sampler == "dynamic_fps1" and self.min > self.clip_frames and self.min % self.clip_frames:
            raise ManifestError(f"min: {self.min} is not a multiple of clip_frames ({self.clip_frames})")
        if self.max % self.clip_frames:
            raise ManifestError(f"max: {self.max} is not a multiple of clip_frames ({self.clip_frames})")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How a still becomes tiles of ``frames.size`` pixels."""

    mode: str = config_field("anyres_nopad", choices=("square", "anyres_nopad"))
    max_grid: int = config_field(6, low=1, doc="largest number of tiles along one side")
    quality: int = config_field(95, low=1, doc="JPEG quality of stills that have to be re-encoded")
    max_side: int = config_field(4096, low=16, doc="stills with a longer side are stored reduced to it")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a conversation becomes token ids and labels."""

    tokenizer: str = config_field(doc="folder of a Hugging Face tokenizer, or a hub name")
    template: str = config_field("qwen_2", choices=("plain", "qwen_2"))
    system: str = "You are a helpful assistant."
    mask_prompt_markers: bool = config_field(
        False, doc="true: do not learn <|im_start|>, <|im_end|> and newline in prompts"
    )
    max_tokens: int = config_field(32768, low=1, doc="longest dialogue and longest row, visual tokens included")
    over_length: str = config_field("cut", choices=("cut", "refuse"))
