"""Exports that load by themselves: the documented example without framestream, published folders, damaged ones."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.shards.memory_index import MediaFile
from framestream.trainer.checkpoint.export import export
from framestream.trainer.export import main
from framestream.trainer.inference.generation import generate
from framestream.trainer.weights import hf_config
from framestream.trainer.weights.load import load_pretrained
from framestream.trainer.weights.tensor_files import INDEX
from tests.helpers.media.footage import BIKES
from tests.helpers.model.rows import SIZE, SMALL
from tests.helpers.model.standalone_exports import chat_prompt, finished_run, load_export, small_manifest
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
#: runs example.py where nothing of this package can be imported
RUN = """
import runpy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("framestream", "pipeline", "trainer", "tools"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
runpy.run_path("example.py", run_name="__main__")
assert not [name for name in sys.modules if name.partition(".")[0] == "framestream"]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run, and an export of it as the page names it, in several shards."""
    folder = tmp_path_factory.mktemp("standalone")
    run = finished_run(folder / "run", small_manifest())
    (run / "manifest.yaml").write_text(yaml.safe_dump(to_dict(small_manifest())))
    export(run, folder / "plain", shard_bytes=100_000)
    assert main(["--checkpoint", str(run), "--self-contained", "--out", str(folder / "standalone")]) == 0
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_the_documented_example_answers_without_framestream(made, tmp_path):
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)
    card = (made / "standalone" / "README.md").read_text(encoding="utf-8")
    assert example.replace('"standalone"', '"OWNER/NAME"') in card
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    (tmp_path / "standalone").symlink_to(made / "standalone")
    (tmp_path / "film.mp4").symlink_to(BIKES)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    prompt, _ = chat_prompt(small_manifest(), "What happens?", [MediaFile(BIKES)])
    model, processor = load_export(made / "standalone")
    content = [{"type": "video", "video": str(BIKES)}, {"type": "text", "text": "What happens?"}]
    pixels = processor([{"role": "user", "content": content}])["pixel_values_videos"]
    ends = model.generation_config.eos_token_id
    prompt = dataclasses.replace(prompt, clips=pixels)
    (answer,) = generate(load_pretrained(made / "standalone"), [prompt], 64, ends)
    wanted = processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert wanted and done.stdout == f"{wanted}\n"


def test_the_files_beside_the_code_are_those_of_any_export(made):
    plain, own = made / "plain", made / "standalone"
    assert main(["--checkpoint", str(plain), "--self-contained", "--out", str(made / "converted")]) == 0
    for folder in (own, made / "converted"):
        found, wanted = tensors(folder), tensors(plain)
        assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    assert (made / "converted" / "processor_config.json").read_bytes() == (own / "processor_config.json").read_bytes()
    config, wanted = (json.loads((folder / "config.json").read_text()) for folder in (own, plain))
    ours = ("architectures", "auto_map")
    assert {name: config[name] for name in config if name not in ours} == {
        name: wanted[name] for name in wanted if name not in ours
    }
    assert config["architectures"] == ["FramestreamForCausalLM"]
    card, first = ((folder / "README.md").read_text() for folder in (made / "converted", own))
    assert card == first and "## Training: stage " in card


@torch.no_grad()
def test_a_published_folder_is_converted_without_its_python_files(made, tmp_path, monkeypatch):
    """Its config.json has no section of ours: the tower follows from its name."""
    tower = VisionTowerConfig(**to_dict(SMALL.vision_tower))
    monkeypatch.setitem(hf_config.HF_TOWERS, "umt-large", (SIZE, tower))
    shutil.copytree(made / "plain", tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    del config["framestream"]
    config |= {"model_type": "qwen2", "mm_vision_tower": "umt-large", "mm_hidden_size": tower.width}
    path.write_text(json.dumps(config))
    (tmp_path / "published" / "modeling_videochat_flash.py").write_text("raise SystemExit('run')\n")
    assert main(["--checkpoint", str(tmp_path / "published"), "--self-contained", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "modeling_videochat_flash.py").exists()
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    sampling = {name: processor["frames"][name] for name in ("sampler", "min", "max", "size", "quality")}
    assert sampling == {"sampler": "dynamic_fps1", "min": 64, "max": 512, "size": SIZE, "quality": None}
    model, _ = load_export(tmp_path / "out")
    theirs, processor = load_export(made / "standalone")
    content = [{"type": "video", "video": str(BIKES)}, {"type": "text", "text": "What happens?"}]
    inputs = processor([{"role": "user", "content": content}])
    assert model(**inputs).logits.equal(theirs(**inputs).logits)


def remove(folder: Path) -> None:
    sorted(folder.glob("model-*"))[1].unlink()


def cut(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../run/final/model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def drop_fields(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "framestream": {"frames": {}}}))


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (remove, 1, f"{INDEX} names files that are missing: model-00002-of-"),
        (cut, 1, "not a file of tensors that can be read"),
        (point_outside, 1, "weight_map has a value that is no name of a file in its folder"),
        (drop_fields, 2, "config.json: framestream.frames.sampler: required field is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), 2, ": tokenizer.json is missing; copy its"),
    ],
)
def test_damaged_folders_are_one_line_and_leave_nothing(made, tmp_path, capsys, damage, status, message):
    shutil.copytree(made / "plain", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    assert (
        main(["--checkpoint", str(tmp_path / "damaged"), "--self-contained", "--out", str(tmp_path / "out")]) == status
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--checkpoint", "x", "--self-contained", "--release-files", "y"],
            "--release-files: not with --self-contained",
        ),
        (["--self-contained", "--push", "me/it"], "--self-contained: needs --checkpoint"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_published_folder_needs_the_option(made, tmp_path, capsys):
    assert main(["--checkpoint", str(made / "plain"), "--out", str(tmp_path / "out")]) == 2
    assert "convert a published checkpoint with --self-contained" in capsys.readouterr().err
