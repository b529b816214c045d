"""Targets of readers: shards, index, build record, token cache, ledger and the files for other readers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.fuzz.commands import call_main, printed, table_digest, use_this_process
from benchmarks.fuzz.corpus import BUILD, MANIFEST, ROOT, SHARDS, TOKENIZER, copy_parts
from benchmarks.fuzz.target import CommandError, Reading, Target, digest_of
from framestream.pipeline import build_loader, load_manifest
from framestream.pipeline.adapters.dataset import ShardDataset
from framestream.pipeline.adapters.types import SampleError
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.ledger import read_ledger
from framestream.pipeline.storage.cache import RangeCache
from framestream.tools import build_shards, export_dataset, inspect_shards, verify_shards

PIXELS = ("input_ids", "labels", "token_weight", "visual_index", "clips", "image_tiles")


def read_epoch(file: str) -> Reading:
    """Read one epoch as training does: each row is one dialogue."""
    loader = build_loader(load_manifest(MANIFEST))
    items, left_out = {}, dict(loader.excluded())
    for batch in loader:
        left_out |= dict(batch.skipped)
        if batch.keys:
            items[batch.keys[0]] = _batch_digest(batch)
    return Reading(items, left_out)


def _batch_digest(batch: Batch) -> str:
    arrays = [np.ascontiguousarray(getattr(batch, name)) for name in PIXELS]
    return digest_of(*(part for array in arrays for part in (str(array.shape), array.tobytes())))


def read_and_verify(file: str) -> Reading:
    """Read one epoch; ``verify_shards --deep`` must find something if the reader leaves something out."""
    reading = read_epoch(file)
    if reading.left_out:
        reading.items["verify_shards"] = _verify().items["verify_shards"]
        reading.items["verify_shards"] = "nothing found" if reading.items["verify_shards"] == "sound" else "sound"
    else:
        reading.items["verify_shards"] = "sound"
    return reading


def _verify(*options: str) -> Reading:
    try:
        call_main(verify_shards.main, ROOT, "--deep", "--workers", "1", *options)
    except CommandError as error:
        if not str(error).startswith("status 1:"):
            raise
        return Reading({"verify_shards": "findings"}, {"findings": printed()})
    return Reading({"verify_shards": "sound"})


def verify_root(file: str) -> Reading:
    """Verify the root; findings are what is left out."""
    reading = _verify()
    return Reading({}, reading.left_out) if reading.left_out else reading


def read_reports(file: str) -> Reading:
    """Read the root by its inspection page and as a PyTorch dataset."""
    call_main(inspect_shards.main, ROOT, "--html", "page.html", "--media", "6", "--frames", "2")
    items, left_out = {"page": digest_of(Path("page.html").read_bytes())}, {}
    for by in ("dialogue", "media"):
        dataset = ShardDataset(ROOT, by=by)
        for number in range(len(dataset)):
            name = f"{by} {number}"
            try:
                sample = dataset[number]
            except SampleError as error:
                left_out[name] = str(error)
                continue
            frames = [medium.frames.numpy().tobytes() for medium in sample.media]
            items[name] = digest_of(*frames, str(sample.dialogues), *(str(m.timestamps.tolist()) for m in sample.media))
    return Reading(items, left_out)


def read_export(file: str) -> Reading:
    """Export the root for a trainer that reads files; damaged media and dialogues about them are left out."""
    with tempfile.TemporaryDirectory() as folder:
        call_main(export_dataset.main, ROOT, "--format", "swift", "--out", folder, accepted=1)
        items, left_out = {}, {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if name.endswith(".jsonl"):
                for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                    media = (*row.get("images", ()), *row.get("videos", ()))
                    digest = digest_of(
                        str(row.get("messages")), *((Path(folder) / found).read_bytes() for found in media)
                    )
                    (left_out if "reason" in row else items)[row.get("key", row.get("id"))] = digest
    return Reading(items, left_out)


def read_twice(file: str) -> Reading:
    """Read the root by the loader, and by a build that has nothing to do."""
    use_this_process()
    reading = read_epoch(file)
    call_main(build_shards.main, *BUILD)
    return reading


def read_ledger_file(file: str) -> Reading:
    """Read the ledger by the inspection page, and by a build that tries again what failed."""
    use_this_process()
    call_main(inspect_shards.main, ROOT, "--html", "page.html", "--media", "0")
    items = {"page": digest_of(Path("page.html").read_bytes()), "ledger": table_digest(read_ledger(ROOT))}
    call_main(build_shards.main, *BUILD, "--retry-failed")
    return Reading(items)


def fill_range_cache(corpus: Path) -> None:
    """Copy a root, and cache its shards as a loader of a remote root does."""
    copy_parts(SHARDS)(corpus)
    cache = RangeCache(Path("fuzz-ranges"), 1 << 30)
    for path in sorted(Path(ROOT).glob("*/*.tar")):
        cache.put(str(path), [path.read_bytes()])


def read_ranges(file: str) -> Reading:
    """Read the shards from the cache. What is not there is read from the root, and cached again."""
    cache = RangeCache(Path("fuzz-ranges"), 1 << 30)
    items = {}
    for path in sorted(Path(ROOT).glob("*/*.tar")):
        found = cache.get(str(path))
        data = path.read_bytes() if found is None else bytes(found)
        cache.put(str(path), [data])
        items[str(path)] = digest_of(data)
    return Reading(items)


_READ = copy_parts(SHARDS, TOKENIZER, MANIFEST)
_BUILT = copy_parts(SHARDS, TOKENIZER, MANIFEST, "media", "samples.json", "held.jsonl")

SHARD_TARGETS = (
    Target("shards", _READ, (f"{ROOT}/video/*.tar", f"{ROOT}/image/*.tar"), read_and_verify, share=2),
    Target("index", _READ, (f"{ROOT}/index/[dms]*.arrow",), read_epoch),
    Target("index-reports", _READ, (f"{ROOT}/index/[dms]*.arrow",), read_reports),
    Target("exported", _READ, (f"{ROOT}/index/[dms]*.arrow", f"{ROOT}/[iv]*/*.tar"), read_export),
    Target("index-verified", _READ, (f"{ROOT}/index/[dms]*.arrow", f"{ROOT}/*/*.tar"), verify_root),
    Target("build-record", _BUILT, (f"{ROOT}/build.json",), read_twice),
    Target("token-cache", _READ, (f"{ROOT}/index/tokens-*.arrow",), read_epoch),
    Target("range-cache", fill_range_cache, ("fuzz-ranges/**/*",), read_ranges, share=0.5),
    Target("ledger", _BUILT, (f"{ROOT}/ledger/ledger.parquet",), read_ledger_file),
)
