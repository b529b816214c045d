"""Paths in the manifest of a run, read from another folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from framestream.pipeline.config.model import InitFromConfig
from framestream.trainer.weights.runs import locate_paths
from tests.helpers.model.manifests import manifest


def test_random_weights_stay_random_beside_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    (tmp_path / "tower").mkdir()
    init = InitFromConfig(vision_tower="tower", connector="random", language_model="random")
    located = locate_paths(dataclasses.replace(manifest(), init_from=init), tmp_path / "runs" / "manifest.yaml")
    assert located.init_from == dataclasses.replace(init, vision_tower=str(tmp_path / "tower"))
