"""A small corpus with good and bad media, written with PyAV and Pillow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import yaml
from PIL import Image

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
TEXT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]


def picture(seed: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Return a smooth random image, uint8 (H, W, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def video(path: Path, seconds: float = 3, fps: int = 8, seed: int = 0, faststart: bool = False) -> Path:
    """Write an H.264 video of moving smooth images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"g": "8", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        base = picture(seed)
        for number in range(round(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(base, number, axis=1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """Write an MP4 with only one second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def still(path: Path, seed: int = 0, width: int = 40, height: int = 30) -> Path:
    """Write an image in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, width, height)).save(path)
    return path


def gif(path: Path, frames: int = 5) -> Path:
    """Write an animation of ``frames`` frames."""
    pictures = [Image.fromarray(picture(seed)) for seed in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


def annotations(path: Path, samples: Sequence[object]) -> Path:
    """Write a list of samples as .json or .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(list(samples)))
    return path


def manifest(path: Path, entries: Sequence[dict], **fields: object) -> Path:
    """Write a manifest of stage 2 with these entries; ``fields`` replace complete sections."""
    value = {
        "stage": 2,
        "output": "runs/stage2",
        "shards": str(path.parent / "shards"),
        "data": {"entries": list(entries), "shard_mb": 1},
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 8, "size": 224},
        "text": {"tokenizer": "tokenizer"},
        "batching": {"global_batch": 4, "row_multiple": 2},
        "train": {part: {"train": True, "lr": 1e-5} for part in ("vision_tower", "connector", "language_model")},
        "init_from": {"run": "runs/stage1"},
        **fields,
    }
    path.write_text(yaml.safe_dump(value))
    return path
