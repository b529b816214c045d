"""One root on a hub and in S3, as every reader opens it there: the same keys, JSON fields and bytes of frames."""

from __future__ import annotations

import json
import runpy
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from framestream.pipeline.adapters import ShardDataset
from framestream.pipeline.shards.index import Index
from framestream.pipeline.upload.addresses import open_target
from framestream.pipeline.upload.shard_root import push_root
from tests.helpers.servers.upload_hub import TOKEN

EXTENSIONS = {"video": "mp4", "image": "jpg", "dialogue": ""}

#: key, JSON, and bytes of the mp4 or jpg, of each train sample of a folder
Samples = Iterator[tuple[str, dict[str, Any], bytes]]


@dataclass
class Place:
    """Where a root is: ``url`` for this project, ``links`` to the train shards by folder, and a profile of MSC."""

    url: str
    links: dict[str, list[str]]
    profile: dict[str, Any]


@pytest.fixture(params=["hub", "s3"])
def place(request, root, tmp_path, monkeypatch) -> Place:
    """A place that has the root."""
    names = {
        folder: [f"{folder}/{path.name}" for path in sorted((root / folder).glob("train-*.tar"))]
        for folder in EXTENSIONS
    }
    if request.param == "hub":
        hub = request.getfixturevalue("hub")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        url, base = "hf://datasets/me/films", f"{hub.url}/datasets/me/films/resolve/main"
        links = {folder: [f"{base}/{name}" for name in shards] for folder, shards in names.items()}
        options = {"repository_id": "me/films", "repo_type": "dataset", "base_path": ""}
        login = {"type": "HuggingFaceCredentials", "options": {"access_token": TOKEN}}
        profile = {"storage_provider": {"type": "huggingface", "options": options}, "credentials_provider": login}
    else:
        bucket, s3_url = request.getfixturevalue("bucket"), request.getfixturevalue("s3_url")
        url, sign = "s3://films/a", bucket.meta.client.generate_presigned_url
        links = {
            folder: [sign("get_object", Params={"Bucket": "films", "Key": f"a/{name}"}) for name in shards]
            for folder, shards in names.items()
        }
        options = {"base_path": "films/a", "endpoint_url": s3_url, "region_name": "us-east-1"}
        profile = {"storage_provider": {"type": "s3", "options": options}}
    push_root(root, open_target(url))
    return Place(url, links, profile)


def by_webdataset(place: Place, folder: str, scratch: Path) -> Samples:
    import webdataset

    if shutil.which("curl") is None:
        pytest.skip("webdataset reads web addresses through curl")
    for sample in webdataset.WebDataset(place.links[folder], shardshuffle=False):
        yield sample["__key__"], json.loads(sample["json"]), sample.get(EXTENSIONS[folder], b"")


def by_datasets(place: Place, folder: str, scratch: Path) -> Samples:
    datasets = pytest.importorskip("datasets")
    if place.url.startswith("hf://"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
            rows = datasets.load_dataset("me/films", folder, split="train", cache_dir=str(scratch))
    else:
        files = {"train": place.links[folder]}
        rows = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(scratch))
    extension = EXTENSIONS[folder]
    if extension:
        feature = datasets.Video if extension == "mp4" else datasets.Image
        rows = rows.cast_column(extension, feature(decode=False))
    for row in rows:
        yield row["__key__"], row["json"], row[extension]["bytes"] if extension else b""


def by_energon(place: Place, folder: str, scratch: Path) -> Samples:
    energon = pytest.importorskip("megatron.energon")
    name = f"{folder}-{scratch.name}"
    (scratch / "msc.yaml").write_text(yaml.safe_dump({"profiles": {name: place.profile}}))

    class Task(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSC_CONFIG", str(scratch / "msc.yaml"))
        alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
        samples = energon.get_val_dataset(
            f"msc://{name}/{folder}", split_part="train", worker_config=alone, batch_size=None, task_encoder=Task()
        )
        for sample in energon.get_loader(samples):
            yield sample["__key__"], json.loads(sample["json"]), sample.get(EXTENSIONS[folder], b"")


READERS = [
    by_webdataset,
    pytest.param(by_datasets, marks=pytest.mark.peers),
    pytest.param(by_energon, marks=pytest.mark.peers),
]


def stored_samples(folder: Path) -> Samples:
    """The train samples of a folder, by tarfile."""
    for shard in sorted(folder.glob("train-*.tar")):
        found: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = archive.extractfile(member).read()
        for key, members in found.items():
            yield key, json.loads(members.pop("json")), next(iter(members.values()), b"")


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_the_same_there(root, place, tmp_path, reader: Callable[..., Samples]):
    for folder in EXTENSIONS:
        expected = list(stored_samples(root / folder))
        assert len(expected) > 1 and list(reader(place, folder, tmp_path)) == expected, folder


def test_the_loader_gives_the_same_frames_there(root, place):
    here, there = (ShardDataset(where, by="media") for where in (root, place.url))
    assert len(here) == len(there) > 2
    for number in range(len(here)):
        for one, other in zip(here[number].media, there[number].media, strict=True):
            assert one.key == other.key and np.array_equal(one.frames, other.frames)
        assert here[number].dialogues == there[number].dialogues


@pytest.mark.peers
def test_the_card_opens_a_root_in_a_folder(root, tmp_path):
    datasets = pytest.importorskip("datasets")
    index = Index.open(root)
    for folder in EXTENSIONS:
        rows = datasets.load_dataset(str(root), folder, cache_dir=str(tmp_path / "cache"))
        samples = {split: len(rows[split]) for split in rows}
        assert samples == {
            split: sum(
                row["samples"] for row in index.shards.to_pylist() if (row["folder"], row["split"]) == (folder, split)
            )
            for split in samples
        }
        assert "train" in samples
    assert {"mp4", "json"} <= set(
        datasets.load_dataset(str(root), cache_dir=str(tmp_path / "cache"))["train"].column_names
    )


@pytest.mark.peers
def test_the_example_of_the_card_runs(root, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    code = (root / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    for name in ("hf://datasets/OWNER/NAME", "OWNER/NAME"):
        code = code.replace(name, str(root))
    (tmp_path / "example.py").write_text(code)
    found = runpy.run_path(str(tmp_path / "example.py"))
    assert found["sample"].media[0].frames.shape[0] == 8 and len(found["samples"]) > 1
