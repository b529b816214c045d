"""Megatron-Energon on a root: its command, a training loader with workers and resuming, and the cookers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from framestream.pipeline.adapters import ShardDataset

pytestmark = pytest.mark.peers
energon = pytest.importorskip("megatron.energon")

from framestream.pipeline.adapters.energon import DialogueSample, MediaSample, cook_dialogue, media_cooker  # noqa: E402


class MediaTask(energon.DefaultTaskEncoder):
    decoder = None
    cookers = [energon.Cooker(media_cooker(frames=8))]


class DialogueTask(energon.DefaultTaskEncoder):
    decoder = None
    cookers = [energon.Cooker(cook_dialogue)]


def training(folder: Path, task, workers: int):
    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    settings = {"batch_size": None, "shuffle_buffer_size": 4, "max_samples_per_sequence": None}
    made = energon.get_train_dataset(folder, worker_config=config, task_encoder=task, **settings)
    return energon.get_savable_loader(made)


def take(loader, count: int) -> list[str]:
    return [sample.__key__ for _, sample in zip(range(count), loader, strict=False)]


@pytest.mark.parametrize("folder", ["video", "image"])
def test_cooked_media_are_those_of_the_data_set(footage_root, folder):
    wanted = {sample.media[0].key: sample for sample in ShardDataset(footage_root, by="media", frames=8)}
    wanted = {key: sample for key, sample in wanted.items() if sample.media[0].kind == folder}
    read = {}
    for _, sample in zip(range(30), training(footage_root / folder, MediaTask(), 0), strict=False):
        assert isinstance(sample, MediaSample)
        read[sample.__key__] = sample
    assert read.keys() == wanted.keys()
    for key, sample in read.items():
        (item,) = wanted[key].media
        assert torch.equal(sample.frames, item.frames) and torch.equal(sample.timestamps, item.timestamps)
        assert (sample.start, sample.duration) == (item.start, item.duration)
        assert sample.dialogues == wanted[key].dialogues


def test_cooked_dialogues_name_their_media(footage_root):
    wanted = {sample.dialogues[0].key: sample for sample in ShardDataset(footage_root, frames=1)}
    read = {}
    for _, sample in zip(range(80), training(footage_root / "dialogue", DialogueTask(), 0), strict=False):
        assert isinstance(sample, DialogueSample)
        read[sample.__key__] = sample
    assert read.keys() == wanted.keys()
    for key, sample in read.items():
        assert [sample.dialogue] == wanted[key].dialogues
        assert sample.media == [item.key for item in wanted[key].media]


def test_a_training_loader_with_workers_goes_on_where_it_stopped(footage_root):
    folder = footage_root / "dialogue"
    whole = take(training(folder, DialogueTask(), 2), 20)
    assert set(whole) == {sample.dialogues[0].key for sample in ShardDataset(footage_root, frames=1)}
    assert max(Counter(whole).values()) <= 5
    begun = training(folder, DialogueTask(), 2)
    first = take(begun, 7)
    state = begun.save_state_rank()
    resumed = training(folder, DialogueTask(), 2)
    resumed.restore_state_rank(state)
    assert first + take(resumed, 13) == whole


@pytest.mark.parametrize("folder", ["video", "dialogue"])
def test_the_held_out_split_is_apart(footage_root, folder):
    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    task = DialogueTask() if folder == "dialogue" else MediaTask()
    made = energon.get_val_dataset(footage_root / folder, worker_config=alone, batch_size=None, task_encoder=task)
    dataset = ShardDataset(footage_root, split="val", by="dialogue" if folder == "dialogue" else "media")
    assert [s.__key__ for s in energon.get_loader(made)] == [dataset.key(number) for number in range(len(dataset))]


def test_energon_info_counts_samples_and_shards(footage_root):
    command = Path(sys.executable).parent / "energon"
    for folder, counts in (("video", (4, 2)), ("image", (3, 1)), ("dialogue", (9, 2))):
        (footage_root / folder / ".nv-meta" / "info.yaml").write_text(
            "sample_type: {__module__: megatron.energon, __class__: CrudeSample}\n"
        )
        said = subprocess.run(
            [command, "info", "--dataset-config", "info.yaml", str(footage_root / folder)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"{counts[0]} samples" in said and f"in {counts[1]} shards" in said
