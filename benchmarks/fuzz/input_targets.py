"""Targets of a user's own texts: annotations, manifest, root map and tokenizer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.fuzz.build_targets import build_root, prepare_archives
from benchmarks.fuzz.commands import call_main, printed
from benchmarks.fuzz.corpus import BUILD, MANIFEST, SHARDS, TOKENIZER, copy_parts, dialogue, write_small_manifest
from benchmarks.fuzz.shard_targets import read_epoch
from benchmarks.fuzz.target import Reading, Target, digest_of
from framestream.pipeline import load_manifest
from framestream.pipeline.annotations.reader import AnnotationFileError
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.shards.index import ShardsError
from framestream.tools import build_shards
from framestream.trainer import __main__ as trainer

ANNOTATIONS = ("list.json", "lines.jsonl", "packed.jsonl.gz", "rows.parquet", "nested.parquet")


def prepare_annotations(corpus: Path) -> None:
    """Write the same dialogues in every kind of annotation file."""
    copy_parts(TOKENIZER, "media/0.jpg", "media/1.jpg")(corpus)
    samples = [dialogue("one", image="0.jpg"), dialogue("two", image="1.jpg"), dialogue("text"), dialogue("more")]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    Path("list.json").write_text(json.dumps(samples, indent=1), encoding="utf-8")
    Path("lines.jsonl").write_text(lines, encoding="utf-8")
    Path("packed.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    pq.write_table(pa.Table.from_pylist(samples), "nested.parquet")
    pq.write_table(pa.Table.from_pylist(samples), "rows.parquet", compression="zstd", row_group_size=2)
    write_small_manifest([{"annotation": name, "root": "media"} for name in ANNOTATIONS])


def ask_questions(file: str) -> Reading:
    """Read the questions of each annotation file, as a scoring command does."""
    manifest, items, left_out = load_manifest(MANIFEST), {}, {}
    for name in ANNOTATIONS:
        try:
            questions = FileQuestions(manifest, name, "media")
        except (AnnotationFileError, ShardsError) as error:
            left_out[name] = str(error)
            continue
        for number in range(len(questions)):
            question = questions[number]
            items[f"{name} {question.key}"] = digest_of(str(question).replace(str(Path.cwd()), ""))
        left_out |= {f"{name} {number}": line for number, line in enumerate(questions.rejected)}
    return Reading(items, left_out)


def dry_run(file: str) -> Reading:
    """Load the manifest, and describe its build and its run."""
    items = {"manifest": digest_of(yaml.safe_dump(to_dict(load_manifest(MANIFEST))))}
    call_main(build_shards.main, *BUILD, "--dry-run")
    call_main(trainer.main, "--manifest", MANIFEST, "--dry-run")
    return Reading(items)


def plan_build(file: str) -> Reading:
    """Describe the build of a root map. Locations that cannot be read are in its table."""
    call_main(build_shards.main, *BUILD, "--dry-run")
    return Reading({"plan": digest_of(printed())})


_INPUT = copy_parts(SHARDS, TOKENIZER, "media", "samples.json", "held.jsonl", MANIFEST)

INPUT_TARGETS = (
    Target("annotations", prepare_annotations, ANNOTATIONS, build_root, is_truth=True),
    Target("questions", prepare_annotations, ANNOTATIONS, ask_questions, is_truth=True),
    Target("manifest", _INPUT, (MANIFEST,), dry_run, is_truth=True),
    Target("root-map", prepare_archives, ("fuzz-roots.yaml",), plan_build, is_truth=True),
    Target("tokenizer", copy_parts(SHARDS, TOKENIZER, MANIFEST), (f"{TOKENIZER}/*",), read_epoch, is_truth=True),
)
