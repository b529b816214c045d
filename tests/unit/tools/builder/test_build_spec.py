"""What decides the bytes of a build: the decoder stands in its specification only if it was chosen."""

from __future__ import annotations

import importlib.metadata

import pytest

from framestream.pipeline.config.manifest import ManifestError, load_manifest
from framestream.pipeline.media.decoders.ffmpeg_program import find_ffmpeg
from framestream.tools.builder.build_spec import difference, specification
from tests.helpers.paths import ROOT

MANIFEST = ROOT / "manifests" / "demo" / "stage1.yaml"


def spec_with(*overrides: str) -> dict:
    return specification(load_manifest(MANIFEST, overrides), [], None)


def test_defaults_are_those_of_roots_without_decoders():
    assert spec_with() == spec_with("data.decoder=auto", "data.hwaccel=none")
    assert sorted(spec_with()["data"]) == ["shard_mb", "text_placeholder"]
    assert sorted(spec_with()["libraries"]) == ["av", "numpy", "pillow", "pyarrow", "simplejpeg", "torch"]


def test_another_decoder_or_device_is_another_build():
    plain = spec_with()
    for chosen, name, version in (
        ("decord", "decord2", importlib.metadata.version("decord2")),
        ("ffmpeg", "ffmpeg", find_ffmpeg().version),
    ):
        spec = spec_with(f"data.decoder={chosen}")
        assert spec["data"]["decoder"] == chosen and spec["libraries"][name] == version
        assert difference(plain, spec, []) == f"data.decoder was 'auto' and is now '{chosen}'"
        assert difference(spec, plain, []) == f"data.decoder was '{chosen}' and is now 'auto'"
    assert difference(plain, spec_with("data.decoder=pyav"), []) == "data.decoder was 'auto' and is now 'pyav'"
    assert difference(plain, spec_with("data.hwaccel=cuda"), []) == "data.hwaccel was 'none' and is now 'cuda'"
    assert difference({**plain, "compat": "published"}, plain, []) == "compat was 'published' and is now absent"


def test_a_device_for_decord_is_refused():
    with pytest.raises(ManifestError, match=r"data\.hwaccel: decord has no cuda; set decoder: pyav or ffmpeg, or"):
        load_manifest(MANIFEST, ["data.decoder=decord", "data.hwaccel=cuda"])
