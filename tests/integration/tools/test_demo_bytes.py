"""The shards of a small demo are, byte for byte, those of earlier releases.

The digests were made at commit fd47dc5, with the versions below, on an Intel Xeon with AVX-512. The same came out there
with the code paths of older processors forced in OpenBLAS, numpy and libjpeg-turbo (docs/performance.md). Those of
media.arrow are newer: the table has got a column with the digest of each frame.
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
        "dialogue/train-000000.tar": "da07acb67c1d748b04247de86f1c593b89ff7ed349b3c445a9ce0984e9c3dbae",
        "image/train-000000.tar": "35546df37637a8d302d42ecd7d6425aa2a1e20c47d39ee827ffeba623cc57cb1",
        "video/train-000000.tar": "69afb3eef9219b60fbf57bfaf935ea9589297acfdf3a25ff68aad907756f8c20",
        "index/dialogues.arrow": "420933506c3d3710a6ddadd227da34e21738b66b858bfae19c571e53d4cddb6d",
        "index/media.arrow": "2349847d5cbe14b0fc6990eccd803ee21d25e65158e7f105a6684b2b632b91d0",
        "index/shards.arrow": "7c6e63b05b650273cf757b8d95d48107a86822d9c48724d9b3da1a6276990dfc",
    },
    4: {
        "dialogue/train-000000.tar": "d26b5b4bb73368f97894d141bffd84c41fb16964b24ea5a2fb14db9da56975d6",
        "dialogue/val-000000.tar": "9e1413ece4a4384d64ed0e1592892d54f2af8a2e8c90650ef6fad97a57f9b28e",
        "image/train-000000.tar": "35546df37637a8d302d42ecd7d6425aa2a1e20c47d39ee827ffeba623cc57cb1",
        "video/train-000000.tar": "ec19540056290131a011e427725e6bc46e5c22bfbd13daa15047fc9e652b4b15",
        "video/val-000000.tar": "e59e9f3435b0d9f796993e112380fb50cfeb46aa9f09933372ef9b44a65077f0",
        "index/dialogues.arrow": "fdb2d4885de3c4255b679f4d40776e5995dd8922f1127060ddaa3c5c30bc6ba2",
        "index/media.arrow": "697d73f719440beb9316173181435ffbc84d0bb8d72f4e218e4dabb2ea25d4f0",
        "index/shards.arrow": "6b1bdd4587780ea3b787fe9c21fc520f9fd9b28c55a453a33919b251e74249e1",
    },
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with the demo's data, a fiftieth of it."""
    folder = tmp_path_factory.mktemp("demo")
    demo_data.generate_demo(folder / "demo" / "data", seed=1, workers=2, share=0.02)
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
