"""Train the full-size 2B model for two steps of stage 1 on two CPU ranks, and print memory beside the estimate.

    python -m benchmarks.soak.full_size [--steps 2] [--folder DIR]

The manifest is ``manifests/2b/stage1.yaml``: UMT-L at 448 pixels and Qwen2.5-1.5B in bf16 under ZeRO-3, with random
weights. Only its data, tokenizer and global batch are replaced: a small corpus of the tests, and 4 dialogues a step. It
needs 18 GB of memory and 4 GB of disk, and takes about ten minutes on two cores.

Exits with 1 if the run fails, if a loss is not finite, or if the checkpoint has not the size that was announced.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from benchmarks.soak.errors import SoakError
from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.trainer.checkpoint.disk_usage import checkpoint_bytes
from framestream.trainer.checkpoint.state import latest_checkpoint, read_state
from framestream.trainer.model.memory_estimate import GIB, estimate_memory, fullest_row
from framestream.trainer.training.memory_plan import describe_estimate
from tests.helpers.corpora import training_corpus as corpus

RANKS = 2
GLOBAL_BATCH = 4
MANIFEST = corpus.PROJECT / "manifests" / "2b" / "stage1.yaml"


def write_full_manifest(folder: Path, steps: int) -> Path:
    """Write the manifest of the full-size model for the small corpus, and build its shards at 448 pixels."""
    full = to_dict(load_manifest(MANIFEST))
    tokenizer = str(corpus.PROJECT / "tests" / "golden" / "tokens_labels" / "tokenizer")
    return corpus.make(
        folder,
        videos=4,
        stage=1,
        **{name: full[name] for name in ("frames", "images", "model")},
        text=full["text"] | {"tokenizer": tokenizer, "max_tokens": 1024},
        batching=full["batching"] | {"global_batch": GLOBAL_BATCH, "row_multiple": RANKS},
        train=full["train"] | {"max_steps": steps, "epochs": 10_000, "timeout_minutes": 60.0},
    )


def main() -> int:
    """Run the steps and print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak.full_size", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="a new folder for shards and run; a temporary one if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        try:
            print(run_steps(folder, options.steps))
        except SoakError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def run_steps(folder: Path, steps: int) -> str:
    """Train; return the table of steps and the estimate.

    Raises:
        SoakError: the run failed, or its log or checkpoint is not as expected.
    """
    path = write_full_manifest(folder, steps)
    manifest = load_manifest(path)
    done = corpus.run(*corpus.train_command(path, RANKS), check=False)
    if done.returncode:
        raise SoakError(f"the trainer ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1]:.300}")
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    if len(records) != steps or any(record["loss"] is None or not math.isfinite(record["loss"]) for record in records):
        raise SoakError(f"{folder / 'run' / 'log.jsonl'}: not {steps} steps with a finite loss")
    newest = latest_checkpoint(folder / "run")
    size, announced = sum(read_state(newest)["files"].values()) if newest else 0, checkpoint_bytes(manifest)
    if not 0.9 * announced < size < 1.1 * announced:
        raise SoakError(f"{newest}: has {size:,} bytes, {announced:,} were announced")
    lines = ["| step | loss | seconds | peak memory of a process, GiB |", "| --- | --- | --- | --- |"]
    for record in records:
        peak = record["peak_memory"] / GIB
        lines.append(f"| {record['step']} | {record['loss']:.3f} | {record['seconds']:.0f} | {peak:.2f} |")
    estimate = estimate_memory(manifest, fullest_row(manifest), RANKS, gpu=False)
    lines.append(f"\nestimate for the fullest row: {estimate.total / GIB:.2f} GiB ({describe_estimate(estimate)})")
    lines.append(f"checkpoint: {size:,} bytes, {announced:,} announced")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
