"""The model card of an export: bases, recipe and stages, also of an export of an export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.config.schema import to_dict
from framestream.trainer.checkpoint.model_card import render_model_card
from framestream.trainer.checkpoint.training_history import TrainingHistory, find_history
from framestream.trainer.weights.hf_config import ReleaseConfig
from tests.helpers.model.manifests import manifest


def settings() -> ReleaseConfig:
    made = manifest()
    return ReleaseConfig(made.model, made.frames, made.images, made.text, "bfloat16")


def write_run(folder: Path, stage: int, **start: str) -> Path:
    made = dataclasses.replace(manifest(), stage=stage, init_from=InitFromConfig(**start))
    (folder / "final").mkdir(parents=True)
    (folder / "manifest.yaml").write_text(yaml.safe_dump(to_dict(made)))
    return folder


def test_the_card_names_bases_recipe_and_stages(tmp_path):
    local = tmp_path / "secret" / "tower.pt"
    local.parent.mkdir()
    local.touch()
    first = write_run(tmp_path / "runs" / "stage1", 1, language_model="Qwen/Qwen2-7B-Instruct", vision_tower=str(local))
    second = write_run(tmp_path / "runs" / "stage2", 2, run=str(first), connector="hf:me/parts@v1:connector.bin")
    for checkpoint in (second, second / "final", second / "checkpoints" / "step-000001"):
        history = find_history(checkpoint)
        assert [run.stage for run in history.runs] == [2, 1]
    weights = settings()
    card = render_model_card(weights, history)
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == ["me/parts", "Qwen/Qwen2-7B-Instruct"]
    assert data["pipeline_tag"] == "video-text-to-text" and "license" not in data
    assert "the weights of stage 2" in card and "load_pretrained(" in card
    assert [line for line in card.splitlines() if line.startswith("## Training")] == [
        "## Training: run 2 of 2, stage 2",
        "## Training: run 1 of 2, stage 1",
    ]
    assert str(tmp_path) not in card
    unknown = render_model_card(weights, find_history(tmp_path / "elsewhere" / "x" / "y"))
    assert "base_model" not in ModelCard(unknown).data.to_dict()
    assert "These weights came without the manifest of their training" in unknown and "not known" not in unknown


def test_the_card_tells_adapters_and_runs_of_one_stage_apart(tmp_path):
    before = write_run(tmp_path / "runs" / "before", 3, language_model="random", vision_tower="random")
    run = write_run(tmp_path / "runs" / "tuned", 3, run=str(before))
    lora = {"train": True, "lr": 1e-4, "lora": {"r": 64, "alpha": 128}}
    stored = yaml.safe_load((run / "manifest.yaml").read_text())
    stored["train"] |= {"language_model": lora, "vision_tower": {"train": False}}
    (run / "manifest.yaml").write_text(yaml.safe_dump(stored))
    history = find_history(run)
    _, tuned, first = render_model_card(settings(), history).split("## Training: ")
    assert tuned.startswith("run 2 of 2, stage 3\n") and first.startswith("run 1 of 2, stage 3\n")
    assert "| language model | LoRA adapters of rank 64, alpha 128, merged; learning rate 0.0001 |" in tuned
    assert "| vision tower | frozen |" in tuned and "| connector | learning rate 1e-05 |" in tuned
    assert "LoRA" not in first
    assert "## Training: stage 3\n" in render_model_card(settings(), TrainingHistory(runs=history.runs[1:]))


def test_folders_of_this_machine_are_no_bases(tmp_path):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    run = write_run(tmp_path / "runs" / "one", 2, run="runs/before", language_model="models/qwen", connector="parts/x")
    assert "base_model" not in ModelCard(render_model_card(settings(), find_history(run))).data.to_dict()


def write_export(folder: Path, history: TrainingHistory) -> Path:
    """Write the config.json of an export, as far as its card needs it."""
    folder.mkdir()
    config = {"mm_vision_tower": "umt-large", "framestream": {"model": {}, **history.to_section()}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_export_keeps_the_history_for_the_next_one(tmp_path):
    """Also where a run starts from it. The card is the same as with the manifests."""
    first = write_run(tmp_path / "stage1", 1, language_model="Qwen/Qwen2-7B-Instruct", vision_tower="random")
    second = write_run(tmp_path / "stage2", 2, run=str(first), connector="hf:me/parts@v1:connector.bin")
    history = find_history(second)
    export = write_export(tmp_path / "export", history)
    assert find_history(export) == history
    assert find_history(write_export(tmp_path / "again", find_history(export))) == history
    third, direct = (write_run(tmp_path / name, 3, run=str(start)) for name, start in (("a", export), ("b", second)))
    assert [run.stage for run in find_history(third).runs] == [3, 2, 1]
    assert render_model_card(settings(), find_history(third)) == render_model_card(settings(), find_history(direct))
    assert find_history(write_export(tmp_path / "published", TrainingHistory())) == TrainingHistory()


RUN = {"stage": 1, "entries": 1, "epochs": 1, "global_batch": 1, "max_tokens": 1}
RUN |= dict.fromkeys(("vision_tower", "connector", "language_model"), {"train": False})


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        (5, "framestream.training: expected a mapping"),
        ({"runs": {}}, "framestream.training.runs: expected a list"),
        ({"runs": [RUN, 5]}, "framestream.training.runs[1]: expected a mapping"),
        ({"runs": [RUN | {"stage": "1 | <b>"}]}, "framestream.training.runs[0].stage: expected a whole number"),
        ({"runs": [RUN] * 17}, "framestream.training.runs: 17 are too many, over 16; remove some"),
        ({"base_models": ["me/a"] * 65}, "framestream.training.base_models: 65 are too many"),
        ({"base_models": ["a`](https://x)"]}, "framestream.training.base_models: 'a`](https://x)' is no OWNER/NAME"),
        ({"base_models": ["hf:me/a"]}, "framestream.training.base_models: 'hf:me/a' is no OWNER/NAME of the hub"),
    ],
)
def test_a_damaged_history_is_named_and_left_out(tmp_path, caplog, stored, fault):
    export = write_export(tmp_path / "export", TrainingHistory())
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "framestream": {"training": stored}}))
    assert find_history(export) == TrainingHistory()
    run = write_run(tmp_path / "run", 2, run=str(export))
    assert [run.stage for run in find_history(run).runs] == [2]
    for record in caplog.records:
        line = record.getMessage()
        assert f"config.json: {fault}" in line and line.endswith("the model card does not describe this training")
    assert len(caplog.records) == 2
