"""Shards whose frames keep their aspect ratio, and what the trainer reads from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaViews
from framestream.tools.build_shards import main
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TURNS
from tests.helpers.media.footage import BIKES

SIZES = {"stretch": (128, 128), "short_side": (302, 128), "long_side": (128, 54)}  #: of 640 x 272 pixels


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A manifest for each mode, whose shards are built."""
    base, made = tmp_path_factory.mktemp("modes"), {}
    samples = [{"id": 1, "video": BIKES.name, "conversations": TURNS}]
    entry = {"annotation": str(corpus.annotations(base / "a.json", samples)), "root": str(BIKES.parent)}
    for mode in SIZES:
        (base / mode).mkdir()
        frames = {"sampler": "middle", "min": 4, "max": 8, "size": 128, "quality": 95, "resize": mode}
        made[mode] = corpus.manifest(base / mode / "stage2.yaml", [entry], frames=frames)
        assert main(["--stage", "2", "--manifest", str(made[mode]), "--workers", "1"]) == 0
    return made


def shown(manifest: Manifest) -> np.ndarray:
    """The frames of the only video as the trainer gets them."""
    index = Index.open(manifest.shard_root)
    index.validate_manifest(manifest)
    visuals = MediaViews(index, manifest)
    view = visuals.views([0])[0]
    out = np.empty((len(view.frame_indices), manifest.frames.size, manifest.frames.size, 3), dtype=np.uint8)
    visuals.read_frames(view, 0, out)
    return out


@pytest.mark.parametrize("mode", SIZES)
def test_the_stored_size_follows_the_mode(manifests: dict[str, Path], mode: str) -> None:
    media = Index.open(load_manifest(manifests[mode]).shard_root).media.to_pylist()
    assert [(row["width"], row["height"]) for row in media] == [SIZES[mode]]
    assert [(row["source_width"], row["source_height"]) for row in media] == [(640, 272)]


@pytest.mark.parametrize("mode", ["short_side", "long_side"])
def test_the_trainer_sees_the_stretched_picture_whatever_is_stored(manifests: dict[str, Path], mode: str) -> None:
    stretched = shown(load_manifest(manifests["stretch"])).astype(int)
    for settings in ((), ("frames.resize=stretch",)):
        kept = shown(load_manifest(manifests[mode], settings))
        assert kept.shape == stretched.shape == (8, 128, 128, 3)
        assert np.abs(kept - stretched).mean() < (2 if mode == "short_side" else 5)


def test_larger_frames_than_stored_are_refused(manifests: dict[str, Path]) -> None:
    with pytest.raises(ShardsError, match="frames.size"):
        shown(load_manifest(manifests["short_side"], ("frames.size=256",)))


def test_a_build_goes_on_in_its_own_mode_alone(manifests: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    command = ["--stage", "2", "--manifest", str(manifests["short_side"]), "--workers", "1"]
    assert main([*command, "--set", "frames.resize=stretch"]) == 2
    assert "frames.resize was 'short_side' and is now 'stretch'" in capsys.readouterr().err
