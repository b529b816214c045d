"""Measure how a large generated index is opened and read: seconds to the first batch, and memory.

    python -m benchmarks.loading.index [--dialogues 4000000] [--samples 20000] [--folder DIR]

Each dialogue is a question about one of 20,000 videos of 512 frames. 8 of the frames are used. The JPEGs of all videos
are in one small shard. The token cache is written with the index, as an earlier run would leave it. A new process then
opens the shards, reads the first row and more, and resumes in the middle of the epoch.

Memory is compared with that of the same process after all imports, before it opened anything. Peaks are of all
resident memory, file pages included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from framestream.pipeline import build_loader
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import from_dict
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg
from framestream.pipeline.shards.index import (
    DIALOGUE_SCHEMA,
    FILES,
    MEDIA_SCHEMA,
    SHARD_SCHEMA,
    Index,
    build_table,
    index_digests,
)
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.shards.writer import ShardWriter
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.tokenization.token_cache import token_fingerprint
from framestream.pipeline.tokenization.token_files import SCHEMA as TOKEN_SCHEMA
from framestream.pipeline.utils.atomic_io import file_sha256
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import write_record

TOKENIZER = Path(__file__).parents[2] / "tests" / "golden" / "tokens_labels" / "tokenizer"
MEDIA, STORED, SHOWN, SIDE = 20_000, 512, 8, 64
BATCH = 4096  #: rows written at a time
MIB = 1 << 20


class Memory(NamedTuple):
    """Resident memory of this process, in bytes."""

    now: int  #: resident, file pages included
    anonymous: int  #: resident, without file pages
    peak: int  #: the largest ``now`` since :func:`reset_peak`


class IndexMeasurement(NamedTuple):
    """Times and memory of one process that opened and read a root."""

    idle: Memory
    first_seconds: float  #: from opening to the first row
    first_cpu: float  #: CPU seconds of all cores for the same, independent of other work on the machine
    first: Memory
    reading: list[Memory]  #: after each tenth of the samples
    resume_seconds: float  #: from opening to the first row, resumed in the middle of the second epoch


def manifest(folder: Path) -> Manifest:
    """Return a manifest for the root in ``folder``; prefetch little, so that the index dominates memory."""
    parts = ("vision_tower", "connector", "language_model")
    value = {
        "stage": 3,
        "output": str(folder / "run"),
        "shards": str(folder),
        "data": {"entries": [{"annotation": "generated.jsonl"}]},
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": SHOWN, "size": SIDE},
        "text": {"tokenizer": str(TOKENIZER), "max_tokens": 8192},
        "batching": {"global_batch": 256, "row_multiple": 8},
        "loader": {"prefetch_mb": 8},
        "model": {"vision_tower": {"patch": 8}},
        "init_from": {"vision_tower": "random", "language_model": "random"},
        "train": {part: {"train": True, "lr": 1e-3} for part in parts} | {"epochs": 3},
    }
    return from_dict(Manifest, value, "benchmark")


def generate_index(folder: Path, dialogues: int, media: int = MEDIA) -> None:
    """Write ``folder``/stage3: a shard, the index and the token cache for ``manifest(folder)``."""
    root = folder / "stage3"
    (root / "video").mkdir(parents=True)
    (root / "index").mkdir()
    offsets, sizes, shard = _shard(root / "video" / "train-000000.tar")
    _write(root / "index" / "shards.arrow", SHARD_SCHEMA, build_table(SHARD_SCHEMA, [shard]).to_batches())
    _write(root / "index" / "media.arrow", MEDIA_SCHEMA, _media(media, offsets, sizes))
    _write(root / "index" / "dialogues.arrow", DIALOGUE_SCHEMA, _dialogues(dialogues, media))
    fingerprint = hashlib.sha256()
    for name in FILES:
        fingerprint.update(file_sha256(root / "index" / f"{name}.arrow"))
    write_record(root / "build.json", {"index_fingerprint": fingerprint.hexdigest(), "digests": index_digests(root)})
    config = manifest(folder)
    index = Index.open(root)
    name = token_fingerprint(index, config, build_chat_template(config), MediaViews(index, config))[:32]
    path = root / "index" / f"tokens-{name}.arrow"
    _write(path, TOKEN_SCHEMA, _tokens(dialogues))
    path.rename(path.with_name(f"tokens-{name}-{file_digest(path)}.arrow"))


def _write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch] | list[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(str(path), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _shard(path: Path) -> tuple[list[int], list[int], dict]:
    """Write one video of different frames; return offsets and sizes of its JPEGs and its row of the shard table."""
    frames = [np.full((SIDE, SIDE, 3), 30 * number, dtype=np.uint8) for number in range(SHOWN)]
    jpegs = [encode_jpeg(frame, 90, "420") for frame in frames]
    data = mux_mjpeg(jpegs, np.arange(float(SHOWN)), float(SHOWN), SIDE, SIDE)
    with ShardWriter(path) as writer:
        start, _ = writer.add("v0", {"mp4": data})["mp4"]
    offsets, sizes, _ = mjpeg_frames(data)
    row = {"folder": "video", "split": "train", "name": path.name, "samples": 1, "sha256": writer.sha256}
    return [start + int(offset) for offset in offsets], [int(size) for size in sizes], row | {"bytes": writer.bytes}


def _media(count: int, offsets: list[int], sizes: list[int]) -> Iterator[pa.RecordBatch]:
    frames = list(range(STORED))
    facts = {"kind": "video", "split": "train", "shard": 0, "offset": 0, "size": 0, "width": SIDE, "height": SIDE}
    facts |= {"source_width": SIDE, "source_height": SIDE, "vlen": STORED, "fps": 1.0, "duration": float(STORED)}
    facts |= {"start": 0.0, "sample": frames, "frame_index": frames, "timestamps": [float(frame) for frame in frames]}
    facts |= {"frame_offset": [offsets[frame % SHOWN] for frame in frames], "sha256": "", "source": ""}
    facts |= {"frame_size": [sizes[frame % SHOWN] for frame in frames]}
    repeated = pa.RecordBatch.from_pylist([{"key": "", **facts}] * min(count, BATCH), schema=MEDIA_SCHEMA)
    for start in range(0, count, BATCH):
        batch = repeated.slice(0, min(BATCH, count - start))
        keys = pa.array([f"v{start + row:024d}" for row in range(len(batch))])
        yield pa.RecordBatch.from_arrays([keys, *batch.columns[1:]], schema=MEDIA_SCHEMA)


def _dialogues(count: int, media: int) -> Iterator[pa.RecordBatch]:
    turns = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "Something else. " * 15}]
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        columns = {
            "key": [f"d{row:024d}" for row in rows],
            "split": ["train"] * len(rows),
            "entry": [f"entry_{row * 40 // count:02d}" for row in rows],
            "id": [str(row) for row in rows],
            "media": [[row % media] for row in rows],
            "conversations": [json.dumps(turns)] * len(rows),
            "meta": ["{}"] * len(rows),
        }
        yield pa.RecordBatch.from_pydict(columns, schema=DIALOGUE_SCHEMA)


def _tokens(count: int) -> Iterator[pa.RecordBatch]:
    rng, rows = np.random.default_rng(0), []
    for length in rng.integers(40, 200, min(count, BATCH)).tolist():
        ids = [IMAGE_TOKEN_INDEX, *rng.integers(0, 1000, length - 1).tolist()]
        labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
        clips = SHOWN // 4
        lengths = {"length": length - 1 + 64 * clips, "clips": clips, "tiles": 0, "learned": length - length // 2}
        rows.append({"ids": ids, "labels": labels, **lengths, "error": ""})
    repeated = pa.RecordBatch.from_pylist(rows, schema=TOKEN_SCHEMA)
    for start in range(0, count, BATCH):
        yield repeated.slice(0, min(BATCH, count - start))


# Measuring ------------------------------------------------------------------------------------------------------------


def process_memory() -> Memory:
    """Return the memory of this process as the kernel reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)
              if name in ("VmRSS", "RssAnon", "VmHWM")}  # fmt: skip
    return Memory(fields["VmRSS"], fields["RssAnon"], fields["VmHWM"])


def reset_peak() -> None:
    """Reset the peak of this process's resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_index(folder: Path, samples: int) -> IndexMeasurement:
    """Open the root in ``folder``, read ``samples`` dialogues, then resume elsewhere; call it in a new process."""
    config = manifest(folder)
    build_chat_template(config)  # imports what the tokenizer needs
    reset_peak()
    idle, started, cpu = process_memory(), time.perf_counter(), time.process_time()
    loader = build_loader(config)
    stream = iter(loader)
    done = len(next(stream).keys)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    first, reading = process_memory(), []
    while done < samples:
        done += len(next(stream).keys)
        if done >= (len(reading) + 1) * samples // 10:
            reading.append(process_memory())
    stream.close()
    state = loader.state_dict() | {"epoch": 1, "step": loader.num_batches // 2}
    del stream, loader
    started = time.perf_counter()
    loader = build_loader(config)
    loader.load_state_dict(state)
    next(iter(loader))
    return IndexMeasurement(idle, seconds, cpu, first, reading, time.perf_counter() - started)


def in_process(folder: Path, samples: int) -> IndexMeasurement:
    """Run :func:`measure_index` in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_index, (folder, samples))


def main() -> None:
    """Generate an index, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dialogues", type=int, default=4_000_000)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="for the generated files, 8 GB by default; a temporary one")
    options = parser.parse_args()
    name = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        generate_index(name, options.dialogues)
        size = sum(path.stat().st_size for path in (name / "stage3" / "index").iterdir())
        result = in_process(name, options.samples)
    finally:
        shutil.rmtree(name)
    print(f"{options.dialogues:,} dialogues, {size / 1e9:.2f} GB of index and tokens")
    print(f"first row {result.first_seconds:.2f} s after opening ({result.first_cpu:.2f} s of CPU)")
    print(f"and {result.resume_seconds:.2f} s after opening in the middle of an epoch")
    print(f"{'MiB':<24}{'resident':>10}{'anonymous':>11}{'peak':>8}")
    lines = {"idle, all imported": result.idle, "after the first row": result.first}
    lines |= {f"after {(n + 1) * options.samples // 10:,}": memory for n, memory in enumerate(result.reading)}
    for label, memory in lines.items():
        print(f"{label:<24}{memory.now / MIB:>10.1f}{memory.anonymous / MIB:>11.1f}{memory.peak / MIB:>8.1f}")


if __name__ == "__main__":
    main()
