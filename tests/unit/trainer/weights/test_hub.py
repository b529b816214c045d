"""Weights named on the hub: fetched once, read offline after that, and refused in one line where they cannot be."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.config.schema import to_dict
from framestream.trainer.weights.load import resolve_init_tensors
from framestream.trainer.weights.tensor_files import INDEX, WeightsError, to_hf_name
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, small_model
from tests.helpers.paths import ROOT
from tests.helpers.servers.hub_server import Hub, Repository, serve

pytestmark = pytest.mark.slow

#: prints where each place is, or why it is not anywhere
LOCATE = """
import sys
from framestream.trainer.weights.hub import locate_weights
from framestream.trainer.weights.tensor_files import WeightsError
for place in sys.argv[1:]:
    try:
        print(locate_weights(place))
    except WeightsError as error:
        print("error:", error)
"""
#: fills the model of each manifest OUT/NAME.yaml and saves it in OUT/NAME
INITIALISE = """
import sys
from pathlib import Path
from framestream.pipeline.config.manifest import load_manifest
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, save_weights
for path in Path(sys.argv[1]).glob("*.yaml"):
    manifest = load_manifest(path)
    model = build_model(manifest)
    initialize(model, manifest)
    save_weights(model, path.with_suffix(""), manifest)
"""


def run(code: str, *arguments: object, home: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, because huggingface_hub reads its variables once."""
    kept = {name: value for name, value in os.environ.items() if not re.match("HF_|.*proxy", name, re.IGNORECASE)}
    own = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=kept | own | environment, capture_output=True, text=True, timeout=100)


def torch_file(tensors: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A small model's tensors by published name."""
    return {to_hf_name(name): parameter.detach() for name, parameter in small_model().named_parameters()}


@pytest.fixture(scope="module")
def hub(weights, tmp_path_factory) -> Iterator[Hub]:
    """An encoder's file, a Qwen2 in shards, a gated adapter and a release."""
    encoder = {n.removeprefix("model.vision_tower.vision_tower."): v for n, v in weights.items() if "vision_tower" in n}
    adapter = {name: value for name, value in weights.items() if "mm_projector" in name}
    folder = tmp_path_factory.mktemp("qwen")
    qwen = Qwen2ForCausalLM(Qwen2Config(**dataclasses.asdict(SMALL.language_model)))
    qwen.load_state_dict({n: v for n, v in weights.items() if n not in adapter and "vision_tower" not in n})
    qwen.save_pretrained(folder, max_shard_size="20KB")
    shards = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert INDEX in shards and len(shards) > 4
    repositories = {
        "acme/encoders": Repository({"UMT-L_f4_vision.pt": torch_file(encoder), "README.md": b"two encoders"}),
        "acme/qwen": Repository(
            shards | {"original/model.safetensors": b"another layout", "pytorch_model.bin": b"old"}
        ),
        "acme/released": Repository({"model.safetensors": save(weights), "config.json": b"{}"}),
        "acme/gated": Repository({"mm_projector.bin": torch_file(adapter)}, token="hf_mine"),
    }
    with serve(repositories) as hub:
        yield hub


@pytest.fixture(scope="module")
def home(hub, weights, tmp_path_factory) -> Path:
    """HF_HOME after a run that started from parts and one that started from a release, both on the hub."""
    return start(hub, weights, tmp_path_factory.mktemp("online"), tmp_path_factory.mktemp("home"), HF_TOKEN="hf_mine")


def start(hub: Hub, weights: dict[str, torch.Tensor], out: Path, home: Path, **environment: str) -> Path:
    """Start both runs and compare all tensors; returns ``home``."""
    parts = InitFromConfig(
        vision_tower="hf:acme/encoders:UMT-L_f4_vision.pt",
        connector="hf:acme/gated@v1:mm_projector.bin",
        language_model="acme/qwen",
    )
    for name, places in (("parts", parts), ("release", InitFromConfig(run="hf:acme/released"))):
        settings = dataclasses.replace(manifest(SIZE, SMALL), init_from=places)
        (out / f"{name}.yaml").write_text(yaml.safe_dump(to_dict(settings)))
    done = run(INITIALISE, out, home=home, endpoint=hub.endpoint, **environment)
    assert not done.returncode, done.stderr[-2000:]
    for name in ("parts", "release"):
        found = load_file(out / name / "model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    return home


def test_every_file_is_fetched_once_and_no_other(hub, home):
    fetched = [path for path in hub.asked if path.startswith("GET") and "/resolve/" in path]
    assert fetched and len(set(fetched)) == len(fetched)
    for name in ("UMT-L_f4_vision.pt", "mm_projector.bin", INDEX, "/model.safetensors"):
        assert any(path.endswith(name) for path in fetched)
    assert not any(name in path for path in fetched for name in ("original", "pytorch_model", "README"))


def test_what_was_fetched_is_read_offline(hub, home, weights, tmp_path):
    before = list(hub.asked)
    start(hub, weights, tmp_path, home, HF_HUB_OFFLINE="1")
    assert hub.asked == before


def test_what_cannot_be_fetched_is_one_line_each(hub, tmp_path):
    places = {
        "hf:acme/none:UMT.pt": "there is no repository acme/none, or it is private; correct the name or set HF_TOKEN",
        "hf:acme/none": "there is no repository acme/none",
        "acme/none": "no such file or folder here, and on the hub: there is no repository acme/none",
        "hf:acme/encoders:UMT.pt": "acme/encoders has no file UMT.pt",
        "hf:acme/encoders@v9:UMT-L_f4_vision.pt": "acme/encoders has no revision v9",
        "hf:acme/qwen@v9": "acme/qwen has no revision v9",
        "hf:acme/gated:mm_projector.bin": "acme/gated is gated; accept its terms on the hub and set HF_TOKEN",
        "hf:acme/gated": "acme/gated is gated",
        "hf:acme/encoders": "acme/encoders has no *.safetensors; name the file, as hf:acme/encoders:FILE",
    }
    done = run(LOCATE, *places, home=tmp_path / "home", endpoint=hub.endpoint)
    assert not done.returncode, done.stderr[-2000:]
    for (place, message), line in zip(places.items(), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"error: {place}: ") and message in line


@pytest.mark.parametrize(("offline", "places"), [("0", ["hf:a/b"]), ("1", ["hf:a/b:c.pt", "hf:a/b@v1", "a/b"])])
def test_without_a_network_or_a_copy_the_line_says_so(tmp_path, offline, places):
    done = run(LOCATE, *places, home=tmp_path, endpoint="http://127.0.0.1:9", HF_HUB_OFFLINE=offline)
    for place, line in zip(places, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"error: {place}: ") and "a/b was not fetched before and the hub cannot be" in line


@pytest.mark.parametrize("place", ["hf:", "hf:acme", "hf:acme/", "hf:a/x:", "hf:a/x@:f", "hf:a/x/y:f", "hf:/a/b"])
def test_places_that_name_nothing_are_refused(place):
    for part in ("vision_tower", "connector", "language_model", "run"):
        init = dataclasses.replace(InitFromConfig(vision_tower="random", language_model="random"), **{part: place})
        settings = dataclasses.replace(manifest(SIZE, SMALL), init_from=init)
        with pytest.raises(WeightsError) as error:
            resolve_init_tensors(small_model(), settings)
        assert str(error.value).startswith(f"init_from.{part}: {place}: is not hf:OWNER/NAME, hf:OWNER/NAME:FILE or")
