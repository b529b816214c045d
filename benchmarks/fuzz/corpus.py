"""The corpus that targets take their files from: media, annotations, a shard root, a tokenizer and a run.

All paths in its files are relative to its folder, so that a copy of it works in another current folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from PIL import Image

from benchmarks.fuzz.commands import call_main, use_this_process
from benchmarks.fuzz.target import Reading
from framestream.tools import build_shards
from framestream.tools.demo.tokenizer import write_tokenizer
from framestream.trainer import __main__ as trainer
from framestream.trainer import evaluate
from framestream.trainer.model.parts import PARTS

SHARDS, RUN, TOKENIZER, CACHE = "fuzz-shards", "fuzz-run", "fuzz-tokenizer", "fuzz-cache"
ADAPTED = "fuzz-adapted"  #: a run that trains adapters on the final weights of RUN
MANIFEST = "fuzz-manifest.yaml"
ROOT = f"{SHARDS}/stage2"
BUILD = ("--stage", "2", "--manifest", MANIFEST, "--workers", "1")
SIDE = 32
QUESTION = "<image>\nWhich color is it?"


def draw_smooth(seed: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """Draw a smooth random image, uint8 (height, width, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_clip(path: Path, seed: int, codec: str = "libx264", seconds: int = 2, rate: int = 4) -> None:
    """Write a short video in the container of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = {"threads": "1"}
        for number in range(seconds * rate):
            image = np.ascontiguousarray(np.roll(draw_smooth(seed), 2 * number, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_image(path: Path, seed: int) -> None:
    """Write an image in the format of its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_smooth(seed)).save(path)


def dialogue(name: str, **media: Any) -> dict[str, Any]:
    """Return a sample of an annotation file about ``media``."""
    question = QUESTION if media else "How are you?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer {name}"}]
    return {"id": name, **media, "conversations": turns}


def write_small_manifest(entries: list[dict[str, Any]], data: Mapping[str, Any] | None = None, **fields: Any) -> None:
    """Write the manifest of a small model into the current folder."""
    parts = ("vision_tower", "connector", "language_model")
    value = {
        "stage": 2,
        "output": RUN,
        "shards": SHARDS,
        "data": {"entries": entries, "shard_mb": 1, "cache": CACHE, **(data or {})},
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 4, "size": 32},
        "images": {"max_grid": 2},
        "text": {"tokenizer": TOKENIZER, "max_tokens": 512},
        "batching": {"global_batch": 1, "row_multiple": 1},
        "loader": {"threads": 1, "prefetch_mb": 4, "max_unreadable": 1000},
        "model": {
            "vision_tower": {"width": 16, "depth": 2, "heads": 2, "patch": 4, "table_side": 8, "group_tokens": 1024},
            "language_model": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 1024,
                "max_position_embeddings": 2048,
            },
        },
        "init_from": dict.fromkeys(parts, "random"),
        "train": {
            **{part: {"train": True, "lr": 1e-3} for part in parts},
            "dtype": "fp32",
            "zero_stage": 3,
            "persistence_threshold": 0,
            "epochs": 1,
            "max_steps": 2,
            "save_every": 1,
        },
        **fields,
    }
    Path(MANIFEST).write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def write_corpus() -> Reading:
    """Write the corpus into the current folder."""
    use_this_process()
    media = Path("media")
    for number in range(3):
        write_clip(media / f"{number}.mp4", number)
        write_image(media / f"{number}.jpg", 10 + number)
    samples = [dialogue(f"v{number}", video=f"{number}.mp4") for number in range(3)]
    samples += [dialogue(f"i{number}", image=f"{number}.jpg") for number in range(3)]
    samples += [dialogue("clip", video="0.mp4", start=0.5, end=1.5), dialogue("text"), dialogue("gone", video="x.mp4")]
    Path("samples.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    Path("held.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples[:2]), encoding="utf-8")
    write_tokenizer(Path(TOKENIZER))
    write_small_manifest(
        [{"annotation": "samples.json", "root": "media"}, {"annotation": "held.jsonl", "root": "media", "split": "val"}]
    )
    call_main(build_shards.main, *BUILD)
    call_main(trainer.main, "--manifest", MANIFEST)
    call_main(evaluate.main, "--manifest", MANIFEST)
    call_main(trainer.main, "--manifest", MANIFEST, *adapter_options())
    return Reading({})


def adapter_options() -> list[str]:
    """Return the options with which the manifest trains adapters of the language model for one step."""
    lora = "train.language_model={train: true, lr: 1e-2, lora: {r: 4, alpha: 8}}"
    bases = (f"init_from.{part}={RUN}/final" for part in PARTS)
    settings = (f"output={ADAPTED}", "train.max_steps=1", "train.vision_tower={train: false}", lora, *bases)
    return [word for value in settings for word in ("--set", value)]


def copy_parts(*names: str) -> Callable[[Path], None]:
    """Return a function that copies files and folders of the corpus into the current folder."""

    def prepare(corpus: Path) -> None:
        for name in names:
            target = Path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            source = corpus / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)

    return prepare
