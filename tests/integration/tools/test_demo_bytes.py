"""The shards of a small demo are, byte for byte, those of earlier builds.

The digests were made with the versions below, on an AMD EPYC without AVX-512. Earlier data of the demo gave the same
bytes on an Intel Xeon with AVX-512, with the code paths of older processors too (docs/performance.md).
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
        "dialogue/train-000000.tar": "e43376358a3c3930d53776c585a697cbc56129b1508d4e0e62026f0e9b979391",
        "dialogue/val-000000.tar": "176c7ee538c91a48dc54c36477debff1363788bf314d95fb334d22db2fa78fd7",
        "image/train-000000.tar": "761625a26e32234c795554ad68c5108113f252fa0e9307361cdcda14acbc489c",
        "video/train-000000.tar": "1859cef09f12bf0376431fa4cf3e706358012f44bcb01cd13dd753a7ee9dc249",
        "video/val-000000.tar": "1c037a129932bee899d92a0035ea7bd57491b6fc19b6303dc4efb8ebf38b3c89",
        "index/dialogues.arrow": "ac0211cf168430a7dc6872e672f33a0fef1ef32b0e96cbd432472cddf7ff8aba",
        "index/media.arrow": "7b1aa9fed771ecef303c62c33fefaaf980a49fb0bfff9ce937e683ffba7e1734",
        "index/shards.arrow": "641f98c39d5d8b67da203a61ca5e2884fb602401d00f1c815149a45826315654",
    },
    4: {
        "dialogue/train-000000.tar": "191b633ed199e8bfc3c261a686e088992909d7d8de589670b7fb52aad48c9ccb",
        "dialogue/val-000000.tar": "0769438e148defac392fc2a02000b9cd26be8f065c5c4bde7297da108506e248",
        "image/train-000000.tar": "761625a26e32234c795554ad68c5108113f252fa0e9307361cdcda14acbc489c",
        "video/train-000000.tar": "29a91f12d24a72c5b4a2b6a65acfe0f74f28d709f51688ac8c65f5dfd45f7e03",
        "video/val-000000.tar": "14bbab9ef3e8086cfab60864002049b4d09d0b3260d8dc91ac7807bee7bec7ad",
        "index/dialogues.arrow": "39f1b9e1cb6e0b668cdaecdd206fbfe9ad320273927b7b9407299f7efc38109c",
        "index/media.arrow": "9a9062ca8a76bbb9df54e83e54f28722aa241c14fd87b19c3504c2f28343d42b",
        "index/shards.arrow": "130ffd08a7287421dce7bf8519ca50ed4f55446853dd870c78ad238445137f41",
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
