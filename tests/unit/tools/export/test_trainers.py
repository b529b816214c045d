"""ms-swift and LLaMA-Factory load exported roots, and make inputs and labels of every dialogue."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from framestream.tools.export_dataset import main
from tests.helpers.corpora.small_build import build_root

pytestmark = pytest.mark.exporters
if not all(importlib.util.find_spec(name) for name in ("swift", "llamafactory")):
    pytest.skip("ms-swift and LLaMA-Factory are not installed", allow_module_level=True)

ANSWERS = {"train": ["A square."] * 5 + ["Good day."], "val": ["A square."] * 2}
VIDEOS, IMAGES = {"train": 4, "val": 1}, {"train": 2, "val": 1}  #: media of all dialogues


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a root, and with a small model and its processor; caches are there, and there is no hub."""
    folder = tmp_path_factory.mktemp("exporters")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HOME", "MODELSCOPE_CACHE"):
            patch.setenv(name, str(folder / name))
        for name in ("HF_HUB_OFFLINE", "MODELSCOPE_OFFLINE", "DISABLE_VERSION_CHECK"):
            patch.setenv(name, "1")
        audio = types.ModuleType("torchaudio")  # LLaMA-Factory imports it, also where nothing is heard
        audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        patch.setitem(sys.modules, "torchaudio", audio)
        from tests.helpers.model.chat_models import chat_model
        from tests.helpers.model.processors import processor

        processor("qwen2_5_vl").save_pretrained(folder / "model")
        chat_model("qwen2_5_vl").save_pretrained(folder / "model")
        build_root(folder)
        yield folder


def exported(place: Path, name: str) -> Path:
    out = place / name
    assert main([str(place / "shards" / "stage2"), "--format", name, "--out", str(out)]) == 0
    return out


def answer(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100]).replace("<|im_end|>", "").strip()


def grids(inputs: list[dict], name: str) -> int:
    return sum(len(item[name]) for item in inputs if item.get(name) is not None)


def test_swift_encodes_every_dialogue(place, monkeypatch):
    from swift.dataset import load_dataset
    from swift.model import get_processor
    from swift.template import get_template

    out = exported(place, "swift")
    monkeypatch.setenv("ROOT_IMAGE_DIR", str(out))
    processor = get_processor(str(place / "model"), model_type="qwen2_5_vl")
    template = get_template(processor, template_type="qwen2_5_vl")
    template.set_mode("train")
    for split, answers in ANSWERS.items():
        rows, _ = load_dataset(str(out / f"{split}.jsonl"), load_from_cache_file=False, strict=True)
        inputs = [template.encode(row) for row in rows]
        assert sorted(answer(processor.tokenizer, item["labels"]) for item in inputs) == answers
        assert grids(inputs, "video_grid_thw") == VIDEOS[split]
        assert grids(inputs, "image_grid_thw") == IMAGES[split]


@pytest.mark.parametrize("name", ["llamafactory", "sharegpt"])
def test_llama_factory_collates_every_dialogue(place, name):
    from llamafactory.data import MultiModalDataCollatorForSeq2Seq, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from transformers import AutoProcessor

    out = exported(place, name)
    settings = {"model_name_or_path": str(place / "model"), "stage": "sft", "do_train": True, "use_cpu": True}
    settings |= {"dataset_dir": str(out), "dataset": "train", "eval_dataset": "val", "template": "qwen2_vl"}
    settings |= {"output_dir": str(place / "out"), "report_to": "none", "cache_dir": str(place / "cache")}
    model, data, training, *_ = get_train_args(settings)
    processor = AutoProcessor.from_pretrained(place / "model")
    parts = {"tokenizer": processor.tokenizer, "processor": processor}
    template = get_template_and_fix_tokenizer(parts["tokenizer"], data)
    found = get_dataset(template, model, data, training, stage="sft", **parts)
    collate = MultiModalDataCollatorForSeq2Seq(template=template, label_pad_token_id=-100, **parts)
    for split, rows in (("train", found["train_dataset"]), ("val", found["eval_dataset"])):
        inputs = [collate([dict(row)]) for row in rows]
        assert sorted(answer(parts["tokenizer"], item["labels"][0]) for item in inputs) == ANSWERS[split]
        assert grids(inputs, "video_grid_thw") == VIDEOS[split]
        filled = ANSWERS[split].count("Good day.")  # the collator adds an image to a text alone
        assert grids(inputs, "image_grid_thw") == IMAGES[split] + filled
