"""An export on a hub of this machine: its card, a stopped upload, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.config.schema import to_dict
from framestream.trainer.checkpoint.model_card import find_manifests, render_model_card
from framestream.trainer.export import main
from framestream.trainer.weights.hf_config import ReleaseConfig
from tests.helpers.model.manifests import manifest
from tests.helpers.servers.upload_hub import upload_hub

EXPORT = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"1" * 2000,
    "model-00002-of-00002.safetensors": b"2" * 2000,
    "README.md": b"# A model\n",
}


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    for name, data in EXPORT.items():
        (tmp_path / "out" / name).write_bytes(data)
    return tmp_path / "out"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with upload_hub(tmp_path / "xet") as running:
        running.point_at(monkeypatch)
        yield running


def push(out: Path) -> int:
    return main(["--out", str(out), "--push", "me/model"])


def test_a_stopped_push_continues_and_config_json_comes_last(hub, out, capsys):
    hub.fail = lambda line: 400 if line.startswith("PUT ") and len(hub.sent("PUT")) > 1 else None
    assert push(out) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: hf://models/me/model: the upload failed (") and "very-secret" not in message
    assert "config.json" not in hub.repositories["models/me/model"].files
    hub.fail = lambda line: None
    hub.asked.clear()
    assert push(out) == 0
    assert len(hub.sent("PUT")) == 1
    files = dict(hub.repositories["models/me/model"].files)
    del files[".gitattributes"]
    assert files == EXPORT
    hub.asked.clear()
    assert push(out) == 0
    assert hub.sent("PUT") == [] and hub.sent("POST") == []
    assert capsys.readouterr().out.endswith("5 files, compared by size and digest; 0 were sent now\n")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("config.json", b"[]", "has other contents ('config.json'); name another address, or empty it"),
        ("model.gguf", b"x", "has other contents ('model.gguf')"),
        ("README.md", b"mine", "has another README.md; save it as"),
    ],
)
def test_a_repository_with_something_else_is_refused(hub, out, capsys, name, data, text):
    assert push(out) == 0
    files = hub.repositories["models/me/model"].files
    files[name] = data
    before = dict(files)
    capsys.readouterr()
    assert push(out) == 2
    assert text in capsys.readouterr().err and hub.repositories["models/me/model"].files == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--push", "model"], "not OWNER/NAME"),
        (["--push", "me/model"], "no export there (no config.json)"),
        ([], "name --checkpoint, or an export with --out and --push"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, text):
    try:
        status = main(["--out", str(tmp_path), *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and text in capsys.readouterr().err


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
        manifests = find_manifests(checkpoint)
        assert [found.stage for found in manifests] == [2, 1]
    made = manifests[0]
    weights = ReleaseConfig(made.model, made.frames, made.images, made.text, "bfloat16")
    card = render_model_card(weights, manifests)
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == ["me/parts", "Qwen/Qwen2-7B-Instruct"]
    assert data["pipeline_tag"] == "video-text-to-text" and "license" not in data
    assert "the weights of stage 2" in card and "## Training of stage 1" in card and "load_pretrained(" in card
    assert str(tmp_path) not in card
    assert find_manifests(tmp_path / "elsewhere" / "x" / "y") == []
    assert "base_model" not in ModelCard(render_model_card(weights, [])).data.to_dict()


def test_folders_of_this_machine_are_no_bases(tmp_path):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    run = write_run(tmp_path / "runs" / "one", 2, run="runs/before", language_model="models/qwen", connector="parts/x")
    made = find_manifests(run)[0]
    weights = ReleaseConfig(made.model, made.frames, made.images, made.text, "float32")
    assert "base_model" not in ModelCard(render_model_card(weights, [made])).data.to_dict()
