"""Every manifest of the repository loads, and the published recipe says what was published.

The counts come from the published description of the recipe, not from the manifests: sets by kind, reader and
sampling, and the samples that the names of LLaVA-Video's annotation files state.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from framestream.pipeline.config.catalog import read_catalog
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.config.yaml_files import load_yaml, read_yaml
from tests.helpers.paths import ROOT

FOLDER = ROOT / "manifests"
NOT_STAGES = {"base.yaml", "roots.example.yaml"}
CATALOGS = sorted((FOLDER / "data").glob("*.yaml"))
STAGES = sorted(path for path in FOLDER.rglob("*.yaml") if path.name not in NOT_STAGES and path not in CATALOGS)
PUBLISHED = ("stage1", "stage2", "stage3", "stage4", "ablation")
#: folder of a published variant -> pixels, encoder file, language model
VARIANTS = {
    "1m": (224, "UMT-L_f4_vision.pt", "Qwen/Qwen2.5-7B-Instruct-1M"),
    "2b": (448, "UMT-L_f4_vision.pt", "Qwen/Qwen2.5-1.5B-Instruct"),
    "internvideo2": (224, "InternVideo2-1B_f4_vision.pt", "Qwen/Qwen2.5-7B-Instruct"),
}


#: manifest -> the first 32 digits of the sha256 of its resolved form as JSON, made at commit fd47dc5, before the
#: sources moved into catalogs; a manifest that is changed on purpose gets a new one
RESOLVED = {
    "1m/stage1": "cfc9560157830e33025f68e3a2620ac4",
    "1m/stage2": "6066854e66d25be6d5bcb961b91ae85e",
    "1m/stage3": "150e7b8369ec47093b771bf2f638fd39",
    "2b/stage1": "6f8586d48c707771bbcfc6737cced81d",
    "2b/stage2": "5aa55049fe773406875a9594fcf73e51",
    "2b/stage3": "49074d6685bf3850f6868d29c9dccb84",
    "ablation": "e5a6471ad9f7ae96fa8e6bda008bc155",
    "demo/stage1": "a9868bb4f429e6d23ecf373c176f3393",
    "demo/stage2": "f3d6b613fd600bae4b480ba221a487e6",
    "demo/stage3": "38311c31d64e6dfd1427a20241b3c11f",
    "demo/stage4": "9021ed06888992c912e3ce6d86f58e01",
    "internvideo2/stage1": "da88f07ed2a2eab7cb31e8a6b22e04f2",
    "internvideo2/stage2": "cf1a4fa7c3a83b83c3a4bfd9f8c1d3c7",
    "internvideo2/stage3": "52db30674ad97439de435ed954afc6bd",
    "stage1": "a07246cda1d616baae53f665b3602bc2",
    "stage2": "5596571fe4ee140e9889222a0eaa0f4f",
    "stage3": "efc510990e8422de1fc29c96bb4d2397",
    "stage4": "650e83a7e34352946c6df83e02314c30",
}


@functools.cache
def load(path: Path) -> Manifest:
    return load_manifest(path)


def published(name: str) -> Manifest:
    return load(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("path", STAGES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_loads_and_outputs_stay_apart(path):
    manifest = load(path)
    names = [(entry.name, entry.split) for entry in manifest.data.entries]
    assert len(set(names)) == len(names), "two entries of one name cannot be told apart in a ledger"
    for other in STAGES:
        if other != path:
            assert load(other).output != manifest.output
            if load(other).shard_root == manifest.shard_root:  # models of one resolution share what is built
                for section in ("stage", "seed", "data", "frames", "images"):
                    assert getattr(load(other), section) == getattr(manifest, section)


@pytest.mark.parametrize("folder", [".", "demo", *VARIANTS])
def test_stages_continue_one_another(folder):
    stages = [load(path) for path in sorted((FOLDER / folder).glob("stage*.yaml"))]
    assert [stage.stage for stage in stages] == ([1, 2, 3] if folder in VARIANTS else [1, 2, 3, 4])
    assert not stages[0].init_from.run
    for before, after in zip(stages, stages[1:], strict=False):
        assert after.init_from.run == before.output
        assert after.model == before.model
        assert after.text.tokenizer == before.text.tokenizer
    trained = [
        "".join(part[0] for part in ("vision_tower", "connector", "language_model") if getattr(stage.train, part).train)
        for stage in stages
    ]
    later = len(stages) - 1
    assert trained == ["c", "vcl", "vcl", "vc"][: len(stages)]
    assert [stage.text.template for stage in stages] == ["plain"] + ["qwen_2"] * later
    assert [stage.frames.sampler for stage in stages] == ["middle"] + ["dynamic_fps1"] * later
    assert [stage.images.mode for stage in stages] == ["square"] + ["anyres_nopad"] * later
    assert {stage.train.zero_stage for stage in stages} == {3}


def test_published_hyper_parameters():
    table = {
        "stage1": (4, 4, 224, 8192, 512, "token"),
        "stage2": (4, 8, 224, 32768, 256, "dialogue"),
        "stage3": (64, 512, 224, 32768, 256, "dialogue"),
        "stage4": (64, 512, 448, 32768, 256, "dialogue"),
        "ablation": (64, 512, 224, 32768, 256, "dialogue"),
    }
    for name, row in table.items():
        manifest = published(name)
        frames, batching = manifest.frames, manifest.batching
        assert row == (
            frames.min,
            frames.max,
            frames.size,
            manifest.text.max_tokens,
            batching.global_batch,
            batching.loss_weight,
        )
        train = manifest.train
        assert (train.epochs, train.warmup, train.clip_norm, train.dtype) == (1, 0.03, 1.0, "bf16")
        assert train.gradient_checkpointing == "all" and frames.clip_frames == 4 and frames.time_message == "short"
        rates = {part: getattr(train, part).lr for part in ("vision_tower", "connector", "language_model")}
        rates = {part: rate for part, rate in rates.items() if getattr(train, part).train}
        high = {"vision_tower": 2e-6, "connector": 1e-5}
        assert rates == {"stage1": {"connector": 1e-3}, "stage4": high}.get(name, {**high, "language_model": 1e-5})
        assert all(getattr(train, part).weight_decay == 0 for part in rates)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_the_published_stages_with_another_model(name):
    """Every other setting is that of the published stage."""
    size, encoder, language_model = VARIANTS[name]
    for stage in ("stage1", "stage2", "stage3"):
        manifest, same = published(f"{name}/{stage}"), published(stage)
        assert manifest.frames.size == size and manifest.text.tokenizer == language_model
        own = {field: getattr(same, field) for field in ("output", "shards", "model", "init_from")}
        text = dataclasses.replace(manifest.text, tokenizer=same.text.tokenizer)
        frames = dataclasses.replace(manifest.frames, size=same.frames.size)
        assert dataclasses.replace(manifest, **own, text=text, frames=frames) == same
    start = published(f"{name}/stage1").init_from
    assert start.vision_tower == f"hf:OpenGVLab/Video_Encoders_for_Training_VideoChat-Flash:{encoder}"
    assert (start.connector, start.language_model) == ("random", language_model)


def test_published_world_sizes_divide_the_rows():
    assert published("stage1").batching.row_multiple % 8 == 0
    assert all(published(name).batching.row_multiple % 32 == 0 for name in PUBLISHED[1:])


@pytest.mark.parametrize(
    ("name", "kinds", "readers", "sampling"),
    [
        ("stage1", {"video": 1, "image": 1}, {"decord": 2}, {"all": 2}),
        ("stage2", {"video": 5, "image": 6, "text": 1}, {"decord": 11, "img": 1}, {"all": 12}),
        (
            "stage3",
            {"video": 88, "image": 15, "auto": 1},
            {"decord": 91, "img": 8, "gif": 5},
            {"all": 88, "first:25%": 13, "first:20%": 1, "first:10%": 2},
        ),
        (
            "stage4",
            {"video": 88, "image": 17, "auto": 1},
            {"decord": 93, "img": 8, "gif": 5},
            {"first:25%": 101, "first:20%": 1, "first:10%": 4},
        ),
        (
            "ablation",
            {"video": 88, "image": 15, "auto": 1},
            {"decord": 91, "img": 8, "gif": 5},
            {"first:25%": 101, "first:20%": 1, "first:10%": 2},
        ),
    ],
)
def test_published_entries(name, kinds, readers, sampling):
    entries = published(name).data.entries
    assert Counter(entry.media_type for entry in entries) == kinds
    assert Counter(entry.reader for entry in entries) == readers
    assert Counter(entry.sampling for entry in entries) == sampling


def test_stage3_names_the_published_places_and_samples():
    entries = published("stage3").data.entries
    video = [entry for entry in entries if entry.root.endswith("/lmms-lab/LLaVA-Video-178K")]
    assert len(video) == 38
    stated = [re.search(r"_processed_(\d+)_with_duration\.jsonl$", entry.annotation) for entry in video]
    assert sum(int(found[1]) for found in stated) == 1_395_547
    assert sum("huggingface.co/" in entry.root for entry in entries) == 64
    assert [entry.name for entry in entries if not entry.root] == ["classification_k710-k710-train_40k"]
    assert Counter(entry.annotation.rsplit(".", 1)[1] for entry in entries) == {"json": 48, "jsonl": 56}


def test_published_annotations_are_files_of_the_hub():
    owners = Counter()
    for name in PUBLISHED:
        for entry in published(name).data.entries:
            found = re.fullmatch(r"hf:([\w-]+/[\w-]+):([^:]+\.jsonl?)", entry.annotation)
            assert found and "tree/main" not in found[2] and not found[2].startswith("/"), entry.annotation
            owners[found[1]] += 1
    assert owners == {
        "OpenGVLab/VideoChat-Flash-Training-Data": 324,
        "lmms-lab/M4-Instruct-Data": 3,
        "lmms-lab/LLaVA-OneVision-Mid-Data": 1,
    }


def test_ablation_is_stage_3_with_fewer_samples():
    whole, part = published("stage3").data.entries, published("ablation").data.entries
    assert [(e.annotation, e.root, e.reader) for e in whole] == [(e.annotation, e.root, e.reader) for e in part]


def test_the_example_root_map_covers_the_published_manifests():
    places = read_yaml(FOLDER / "roots.example.yaml")
    used = set()
    for name in PUBLISHED:
        for entry in published(name).data.entries:
            named = {entry.name, entry.root} & places.keys()
            assert named or entry.media_type == "text", f"{name}: {entry.name}"
            used |= named
    assert used == places.keys(), "a key that no entry has"
    for place in places.values():
        archives = place["archives"] if isinstance(place, dict) else []
        assert isinstance(place, str) or (archives and place.keys() <= {"archives", "join", "inside"})
        for text in archives or [place]:
            assert re.fullmatch(r"dir:/\S+|hf:[\w-]+/[\w-]+:\S+", text)


def test_root_map_example_reads_the_split_zips_of_the_long_videos():
    places = read_yaml(FOLDER / "roots.example.yaml")
    entries = [entry for entry in published("stage3").data.entries if entry.root.endswith("/longvid_subset")]
    assert len(entries) == 4 and all(places[entry.name]["join"] is True for entry in entries)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_resolved_manifests_are_unchanged(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = json.dumps(to_dict(load_manifest(path.relative_to(ROOT))), sort_keys=True)
    name = path.relative_to(FOLDER).with_suffix("").as_posix()
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == RESOLVED[name]


def test_every_catalog_is_used_and_repeats_no_entry():
    used = [name for path in STAGES for name in re.findall(r"data/\w+\.yaml", path.read_text(encoding="utf-8"))]
    assert {FOLDER / name for name in used} == set(CATALOGS)
    for path in CATALOGS:
        annotations = [entry["annotation"] for entry in read_catalog(path, load_yaml)]
        assert len(set(annotations)) == len(annotations)
