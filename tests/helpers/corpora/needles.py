"""Videos, images with one question each, and a manifest, for tests that insert the images into the videos."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from framestream.pipeline import load_manifest
from framestream.pipeline.config.manifest import Manifest
from tests.helpers.corpora.training_corpus import COLOURS, PROJECT, write_video

FRAMES, DEPTHS = (4, 16), (0, 40, 100)


def question(picture: str, answer: str, **more) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]
    return {"id": picture, "image": picture, "conversations": turns, **more}


def make(folder: Path) -> Manifest:
    """Write two valid and two invalid needles, two videos of 32 frames and manifest.yaml; load the manifest."""
    for number, name in enumerate(("red", "blue")):
        write_video(folder / f"{number}.mp4", COLOURS[name], 8, seed=number)
        Image.new("RGB", (300, 140), COLOURS[name]).save(folder / f"{name}.png")
    rows = [question(f"{name}.png", name, options=["red", "blue"]) for name in ("red", "blue")]
    pair = question("red.png", "green") | {"image": ["red.png", "blue.png"]}
    pair["conversations"][0]["value"] += "<image>"
    rows += [pair, question("../red.png", "red")]
    (folder / "needles.json").write_text(json.dumps(rows))
    made = {
        "extends": str(PROJECT / "manifests" / "demo" / "stage3.yaml"),
        "data": {"entries": [{"annotation": str(folder / "needles.json"), "root": str(folder)}]},
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 8, "time_message": "long"},
        "text": {"tokenizer": str(PROJECT / "tests" / "golden" / "tokens_labels" / "tokenizer")},
        "model": {"language_model": {"vocab_size": 1024}},
        "init_from": {"run": "", **dict.fromkeys(("vision_tower", "connector", "language_model"), "random")},
    }
    (folder / "manifest.yaml").write_text(json.dumps(made))
    return load_manifest(folder / "manifest.yaml")
