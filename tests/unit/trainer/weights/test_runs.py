"""Folders of weights and checkpoints of a run, and the paths in its manifest, read from another folder."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.utils.records import write_record
from framestream.trainer.inference.predictor import resolve_run
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE, ReleaseConfig, build_hf_config
from framestream.trainer.weights.runs import (
    locate_paths,
    resolve_weights,
    run_of_weights,
    trained_frames,
    warn_of_frame_size,
)
from framestream.trainer.weights.tensor_files import WeightsError
from tests.helpers.model.manifests import manifest


def test_random_weights_stay_random_beside_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    (tmp_path / "tower").mkdir()
    init = InitFromConfig(vision_tower="tower", connector="random", language_model="random")
    located = locate_paths(dataclasses.replace(manifest(), init_from=init), tmp_path / "runs" / "manifest.yaml")
    assert located.init_from == dataclasses.replace(init, vision_tower=str(tmp_path / "tower"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("frames: {max: 512}", 512), ("frames: 3", None), ("frames: {max: many}", None), ("a: [", None), ("- 1", None)],
)
@pytest.mark.parametrize("folder", [".", "final"])
def test_the_frames_that_were_trained_stand_beside_or_in_weights(tmp_path, folder, text, expected):
    weights = tmp_path / "final"
    weights.mkdir()
    assert trained_frames(weights) is None
    (tmp_path / folder / "manifest.yaml").write_text(text)
    assert trained_frames(weights) == expected


def write_config(folder: Path) -> Path:
    """Write the config.json of the final weights of a run."""
    sections = {name: to_dict(getattr(manifest(), name)) for name in ("model", "frames", "images", "text")}
    folder.mkdir(parents=True)
    write_record(folder / "config.json", {"model_type": NATIVE_MODEL_TYPE, "dtype": "float32", **sections})
    return folder


def write_export_config(folder: Path) -> Path:
    made = manifest()
    settings = ReleaseConfig(made.model, made.frames, made.images, made.text, "float32")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(build_hf_config(settings, {})))
    return folder


def test_a_checkpoint_is_to_be_exported_first(tmp_path):
    """The command in the message names the step, or the file that names one."""
    checkpoints = tmp_path / "a run" / "checkpoints"
    (checkpoints / "step-000002").mkdir(parents=True)
    for name in ("step-000002/state.json", "best", "latest"):
        (checkpoints / name).touch()
    for name in ("step-000002", "best", "latest"):
        with pytest.raises(WeightsError) as error:
            resolve_weights(checkpoints / name)
        words = shlex.split(str(error.value).partition("export it first: ")[2])
        assert words == ["python", "-m", "trainer.export", "--checkpoint", str(checkpoints / name), "--out", "DIR"]
    with pytest.raises(WeightsError, match="step-2: no such checkpoint; .*/checkpoints has step-000002$"):
        resolve_weights(checkpoints / "step-2")
    with pytest.raises(WeightsError, match="a run: no weights there; name a finished run"):
        resolve_weights(tmp_path / "a run")


def test_only_final_weights_belong_to_a_run(tmp_path, monkeypatch):
    final = write_config(tmp_path / "run" / "final")
    assert run_of_weights(resolve_weights(tmp_path / "run")) == run_of_weights(final) == tmp_path / "run"
    assert run_of_weights(write_config(tmp_path / "copied")) is None
    assert run_of_weights(write_export_config(tmp_path / "exported" / "final")) is None
    monkeypatch.chdir(final)
    assert run_of_weights(resolve_weights(".")) == tmp_path / "run"


@pytest.mark.parametrize("write", [write_config, write_export_config])
def test_frames_of_another_size_are_a_warning(tmp_path, caplog, write):
    weights, made = write(tmp_path / "weights"), manifest()
    warn_of_frame_size(weights, made)
    assert not caplog.records
    warn_of_frame_size(weights, dataclasses.replace(made, frames=dataclasses.replace(made.frames, size=448)))
    (record,) = caplog.records
    assert record.getMessage().endswith(f"frames.size is {made.frames.size}; the manifest's 448 is used")


def test_weights_without_a_manifest_need_one(tmp_path):
    with pytest.raises(WeightsError, match=r"name the stage's manifest, too, such as --manifest RUN/manifest.yaml$"):
        resolve_run(write_export_config(tmp_path / "exported"))
