"""The shards of a small demo are, byte for byte, those of earlier builds.

The digests were made with the versions below, on an AMD EPYC with AVX-512. Earlier data of the demo gave the same bytes
on an Intel Xeon, with the code paths of older processors too (docs/performance.md).
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import pytest

from framestream.tools import build_shards, demo_data
from tests.helpers.paths import ROOT

#: what encodes, decodes and writes; other versions may write other bytes
VERSIONS = {"av": "18.1.0", "numpy": "2.4.6", "pillow": "13.0.0", "pyarrow": "26.0.1", "simplejpeg": "1.9.0"}
SHA256 = {
    2: {
        "dialogue/train-000000.tar": "e9123933afb9a68dc8d00bc62148db60747a70a0413b88a6a3f91cbbd7681dbc",
        "dialogue/val-000000.tar": "176c7ee538c91a48dc54c36477debff1363788bf314d95fb334d22db2fa78fd7",
        "image/train-000000.tar": "35546df37637a8d302d42ecd7d6425aa2a1e20c47d39ee827ffeba623cc57cb1",
        "video/train-000000.tar": "2d18e27f308f82c5decaf291da7ba241ded460654f297634941648e614b850c9",
        "video/val-000000.tar": "a47ebf6e9d06eba4d37d70b4d69b66a006a1789f3c72b548f6c002a5909d5179",
        "index/dialogues.arrow": "30b32766f63e1a41777fca1b87680e7a5a7ea1ebd187d258eba2f20588547944",
        "index/media.arrow": "37816e79975cf3d7b9e2a9859de8bf370a61c9d3bcf9ec9608ae398afd675f94",
        "index/shards.arrow": "fc1dd4c3efccc4047473673e9d8353c820b1c796c05a9ad3599b28a2e5d6c00c",
    },
    4: {
        "dialogue/train-000000.tar": "f2568e157fd4975b81930e63a4625d04694411ee2692e606df9bcdaeaaa371c3",
        "dialogue/val-000000.tar": "0769438e148defac392fc2a02000b9cd26be8f065c5c4bde7297da108506e248",
        "image/train-000000.tar": "35546df37637a8d302d42ecd7d6425aa2a1e20c47d39ee827ffeba623cc57cb1",
        "video/train-000000.tar": "e620fb499be53aec6e9242b50639c25b00a13d3b356717ca16ff07bf9624ff39",
        "video/val-000000.tar": "cfb21fed57f8d93c4bbff100b5d74252ad22e0ea48912062e2702f65743f987a",
        "index/dialogues.arrow": "fbd75205bee593628928f9244eb5c39d8064b022e0b21fa3e369da505c9fd094",
        "index/media.arrow": "c0bc71f81e9952370ea20b5440a8df0e15e3c09f729442d790eef2a33da1142d",
        "index/shards.arrow": "c2d403ed948bb893f617b808d4026248c5a9c04f5d291e3ed9323c7392f78936",
    },
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with a small part of the demo's data."""
    folder = tmp_path_factory.mktemp("demo")
    demo_data.generate_demo(folder / "demo" / "data", seed=1, workers=2, share=0.002)
    return folder


@pytest.mark.parametrize("stage", SHA256)
def test_demo_shards_keep_their_bytes(demo, monkeypatch, stage):
    others = {name: version(name) for name in VERSIONS if version(name) != VERSIONS[name]}
    if others:
        pytest.skip(f"the digests belong to other versions than {others}")
    monkeypatch.chdir(demo)
    manifest = ROOT / "manifests" / "demo" / f"stage{stage}.yaml"
    arguments = ["--stage", str(stage), "--manifest", str(manifest), "--out", "shards", "--workers", "2"]
    assert build_shards.main(arguments) == 0
    root = demo / "shards" / f"stage{stage}"
    written = [*root.rglob("*.tar"), *(root / "index").glob("[!t]*.arrow")]
    found = {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
    assert found == SHA256[stage]
