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
        "dialogue/train-000000.tar": "b89245d6735908d984c33ec871dc1e973c16dee71c39bd0e00b038737b786183",
        "dialogue/val-000000.tar": "176c7ee538c91a48dc54c36477debff1363788bf314d95fb334d22db2fa78fd7",
        "image/train-000000.tar": "761625a26e32234c795554ad68c5108113f252fa0e9307361cdcda14acbc489c",
        "video/train-000000.tar": "2f0284847592f0d370e2995dea107bfd511edadf6dad3eb41af0c54ed5aca971",
        "video/val-000000.tar": "1c037a129932bee899d92a0035ea7bd57491b6fc19b6303dc4efb8ebf38b3c89",
        "index/dialogues.arrow": "1e5edf54b0a7deb925ea2df288180fd0ba27a0b3d3bbe5443b9156fe717de7e9",
        "index/media.arrow": "4ad77fae88d5dfd02c30613e7ad1545c75be7935ea5ec0c48da7511838b1a593",
        "index/shards.arrow": "b7d125d97b6006b9cc89c77a629f75c54c7e8d43c60c5dd18ea4a2290a38a36f",
    },
    4: {
        "dialogue/train-000000.tar": "f75027d8f676429c58fc67eed2bfb507a5d463fccbc3285d3c172f0e0be40d5f",
        "dialogue/val-000000.tar": "0769438e148defac392fc2a02000b9cd26be8f065c5c4bde7297da108506e248",
        "image/train-000000.tar": "761625a26e32234c795554ad68c5108113f252fa0e9307361cdcda14acbc489c",
        "video/train-000000.tar": "c195a0e2df8d8de56fed11e8ce29836348b3dca547fc7b3fe2fdd7148fb495a6",
        "video/val-000000.tar": "14bbab9ef3e8086cfab60864002049b4d09d0b3260d8dc91ac7807bee7bec7ad",
        "index/dialogues.arrow": "cc802d1cfb4c06ec5760e20ff91be85c6a77e3368ed4b9b20701b79d1bad0aba",
        "index/media.arrow": "4899f055d96612cca9670f0b7d0be98d190abe754bc6045f377d3aec4b2ee7e1",
        "index/shards.arrow": "7239171633429791348b402e323e0b75a301cf3644c2cd797a712640ed740f8a",
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
