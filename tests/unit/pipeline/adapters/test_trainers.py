"""Models of other families learn from the shards in other trainers."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch.utils.data import Subset

from framestream.pipeline.adapters import ChatCollator, ShardDataset, as_hf_dataset
from tests.helpers.model.chat_models import chat_model
from tests.helpers.model.processors import processor

pytestmark = pytest.mark.peers
if not importlib.util.find_spec("torchvision"):
    pytest.skip("torchvision is not installed", allow_module_level=True)

SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 3,
    "logging_steps": 1,
    "remove_unused_columns": False,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
}
NAMES = ("qwen2_5_vl", "qwen3_vl", "llava_next_video", "llava_onevision", "smolvlm2")


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_of_transformers_learns_answers(footage_root, tmp_path, name):
    from transformers import Trainer, TrainingArguments

    dataset = Subset(ShardDataset(footage_root, frames=8), [0, 5, 7])  # a video, an image, text
    settings = TrainingArguments(str(tmp_path), learning_rate=1e-2, **SETTINGS)
    collator = ChatCollator(processor(name), labels=True)
    trainer = Trainer(chat_model(name), settings, train_dataset=dataset, data_collator=collator)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(265), abs=0.5)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_hugging_face_has_the_samples(footage_root, streaming):
    import datasets

    made = as_hf_dataset(footage_root, frames=8, streaming=streaming)
    assert isinstance(made, datasets.IterableDataset if streaming else datasets.Dataset)
    wanted = list(ShardDataset(footage_root, frames=8))
    found = [row["sample"] for row in made]
    assert [sample.dialogues for sample in found] == [sample.dialogues for sample in wanted]
    for sample, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(sample.media, other.media, strict=True))
    shuffled = [row["sample"].dialogues[0].key for row in made.shuffle(seed=1)]
    assert sorted(shuffled) == sorted(sample.dialogues[0].key for sample in wanted)


@pytest.mark.parametrize("name", NAMES)
def test_trl_with_adapters_learns_answers(footage_root, tmp_path, name):
    pytest.importorskip("trl")
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    made = processor(name)
    prepared = {"skip_prepare_dataset": True}
    settings = SFTConfig(str(tmp_path), learning_rate=1e-1, bf16=False, dataset_kwargs=prepared, **SETTINGS)
    trainer = SFTTrainer(
        chat_model(name),
        args=settings,
        train_dataset=as_hf_dataset(footage_root, frames=8).select([0, 5, 7]),
        data_collator=ChatCollator(made, labels=True),
        processing_class=made,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 3 and losses[0] > losses[2]
    learned = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert learned and all("lora_" in name for name in learned)
