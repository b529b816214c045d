"""Create this folder: a shard root, its token cache and two runs. Start it at commit 1b40da8, from the top folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from framestream.pipeline import build_loader, load_manifest
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora import training_corpus as training

FOLDER = Path("tests/data/before_digests")
TURNS = [{"from": "human", "value": "<image>\nWhich color is it?"}, {"from": "gpt", "value": "red"}]
MANIFEST = {
    "stage": 2,
    "output": str(FOLDER / "finished"),
    "shards": str(FOLDER / "root"),
    "data": {"entries": [{"annotation": str(FOLDER / "samples.json"), "root": str(FOLDER / "media")}]},
    "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 4, "size": 64},
    "images": {"max_grid": 2},
    "text": {"tokenizer": "tests/golden/tokens_labels/tokenizer", "max_tokens": 1024},
    "batching": {"global_batch": 3, "row_multiple": 4},
    "model": {
        "vision_tower": {"width": 16, "depth": 2, "heads": 2, "patch": 8, "table_side": 8, "group_clips": 4},
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
    "init_from": {"vision_tower": "random", "connector": "random", "language_model": "random"},
    "train": {
        **{part: {"train": True, "lr": 1e-3} for part in ("vision_tower", "connector", "language_model")},
        "dtype": "fp32",
        "zero_stage": 3,
        "persistence_threshold": 0,
        "epochs": 2,
        "save_every": 100,
    },
}


def create_root() -> Path:
    """Build the root from three videos, an image, a text and an item that is missing; return its manifest."""
    for number in range(3):
        corpus.video(FOLDER / "media" / f"{number}.mp4", seconds=2, fps=4, seed=number)
    corpus.still(FOLDER / "media" / "3.png", seed=3)
    samples = [{"id": f"v{number}", "video": f"{number}.mp4", "conversations": TURNS} for number in range(3)]
    samples += [{"id": "i", "image": "3.png", "conversations": TURNS}, {"id": "t", "conversations": corpus.TEXT}]
    samples += [{"id": "clip", "video": "0.mp4", "start": 0.5, "end": 1.5, "conversations": TURNS}]
    samples += [{"id": "missing", "video": "4.mp4", "conversations": TURNS}]
    corpus.annotations(FOLDER / "samples.json", samples)
    path = FOLDER / "manifest.yaml"
    path.write_text(yaml.safe_dump(MANIFEST, sort_keys=False))
    training.run(sys.executable, "tools/build_shards.py", "--stage", "2", "--manifest", str(path), "--workers", "1")
    shutil.rmtree(FOLDER / "media")
    return path


def save_rows(manifest: Path) -> None:
    """Save the tensors of the first epoch as rows.npz; this also writes the token cache."""
    arrays = {}
    for number, batch in enumerate(build_loader(load_manifest(manifest))):
        arrays[f"{number}.keys"] = np.array(batch.keys)
        for name in ("input_ids", "labels", "clips", "image_tiles"):
            arrays[f"{number}.{name}"] = np.asarray(getattr(batch, name))
    np.savez_compressed(FOLDER / "rows.npz", **arrays)


def train(manifest: Path) -> None:
    """Train to the end in finished/, and in stopped/ until a signal after two steps."""
    command = [sys.executable, "-m", "trainer", "--manifest", str(manifest)]
    training.run(*command)
    shutil.rmtree(FOLDER / "finished" / "checkpoints")
    stopped = FOLDER / "stopped"
    process = subprocess.Popen([*command, "--set", f"output={stopped}"], env=training.environment())
    while process.poll() is None and not (stopped / "log.jsonl").is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    for run in (FOLDER / "finished", stopped):
        shutil.rmtree(run / "tensorboard", ignore_errors=True)


if __name__ == "__main__":
    path = create_root()
    save_rows(path)
    train(path)
    print(json.dumps({str(p): p.stat().st_size for p in sorted(FOLDER.rglob("*")) if p.is_file()}, indent=1))
