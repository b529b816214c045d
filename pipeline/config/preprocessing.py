"""Settings of preprocessing: how videos, images and text become model inputs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from framestream.pipeline.config.schema import ManifestError, spec

SAMPLERS = ("middle", "dynamic_fps1", "rand")  #: values of ``frames.sampler`` besides ``fpsX``


@dataclass(frozen=True, kw_only=True)
class FramesConfig:
    """How frames of a video are sampled, resized and encoded, when building and when reading."""

    sampler: str = field(metadata=spec(doc="middle, dynamic_fps1, rand, or fpsX with X frames per second"))
    min: int = field(metadata=spec(low=1, high=100_000))
    max: int = field(metadata=spec(low=1, high=100_000))
    size: int = field(metadata=spec(low=16, high=4096, doc="side of a frame in pixels, as the model sees it"))
    resize: str = field(
        default="stretch",
        metadata=spec(
            choices=("stretch", "short_side", "long_side"),
            doc="stored frames: size x size, or with their aspect ratio and a short or long side of size pixels",
        ),
    )
    clip_frames: int = field(
        default=4, metadata=spec(choices=(4,), doc="frames of one clip, the unit of the vision tower")
    )
    time_message: str = field(default="short", metadata=spec(choices=("short", "long", "none")))
    quality: int = field(default=90, metadata=spec(low=1, high=100, doc="JPEG quality of stored frames"))
    subsampling: str = field(default="420", metadata=spec(choices=("420", "422", "444")))

    def __post_init__(self) -> None:
        rate = re.fullmatch(r"fps([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})", self.sampler)
        if self.sampler not in SAMPLERS and not (rate and 0.001 <= float(rate[1]) <= 1000):
            raise ManifestError(
                f"sampler: {self.sampler!r:.40} is not middle, dynamic_fps1, rand or fpsX such as fps2, "
                f"with X from 0.001 to 1,000"
            )
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
    """How an image becomes tiles of ``frames.size`` pixels."""

    mode: str = field(default="anyres_nopad", metadata=spec(choices=("square", "anyres_nopad")))
    max_grid: int = field(default=6, metadata=spec(low=1, high=32, doc="largest number of tiles along one side"))
    quality: int = field(
        default=95, metadata=spec(low=1, high=100, doc="JPEG quality of images that are encoded again")
    )
    max_side: int = field(
        default=4096, metadata=spec(low=16, high=65_500, doc="images with a longer side are stored reduced to it")
    )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How a dialogue becomes token ids and labels."""

    tokenizer: str = field(metadata=spec(path="any", doc="folder of a Hugging Face tokenizer, or a hub name"))
    template: str = field(default="qwen_2", metadata=spec(choices=("plain", "qwen_2")))
    system: str = "You are a helpful assistant."
    mask_prompt_markers: bool = field(
        default=False, metadata=spec(doc="true: <|im_start|>, <|im_end|> and newlines in prompts get no labels")
    )
    max_tokens: int = field(
        default=32768,
        metadata=spec(low=1, high=100_000_000, doc="longest dialogue and longest row, visual tokens included"),
    )
    over_length: str = field(default="cut", metadata=spec(choices=("cut", "refuse")))
