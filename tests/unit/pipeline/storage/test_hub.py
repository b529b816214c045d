"""A root in a data set of a hub on this machine."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from huggingface_hub import constants

from framestream.pipeline import ShardsError
from framestream.pipeline.shards.index import Index
from framestream.pipeline.storage import ReadOptions
from tests.helpers.corpora.batches import batches
from tests.helpers.corpora.small_root import manifest
from tests.helpers.servers.fetch_hub import COMMIT, serve_hub


def point_at(url, monkeypatch):
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(server, root, monkeypatch):
    """The root under shards/ of the data set me/data, its larger files behind redirects."""
    point_at(server.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    paths = [path for path in (root / "stage2").rglob("*") if path.is_file() and not path.name.startswith("tokens-")]
    serve_hub(server, {f"shards/{path.relative_to(root).as_posix()}": path.read_bytes() for path in paths})
    return server


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}", "@refs%2Fpr%2F1"])
def test_batches_are_those_of_the_folder(hub, root, tmp_path, revision):
    cache = str(tmp_path / "cache")
    remote = manifest(root, shards=f"hf://datasets/me/data{revision}/shards", loader__cache=cache)
    assert batches(remote) == batches(manifest(root))
    resolved = [headers for path, headers in hub.asked if "/resolve/" in path]
    assert resolved and all(headers["authorization"] == "Bearer hf_secret" for headers in resolved)


def test_a_bucket_of_the_hub(hub, root, tmp_path):
    """Its files are behind redirects, and the token goes to the hub only."""
    for path in (root / "stage2").rglob("*"):
        if path.is_file():
            name = f"of me/{path.relative_to(root).as_posix()}"
            hub.routes[f"/cdn/{quote(name)}"] = lambda request, path=path: request.serve(path.read_bytes())
            hub.routes[f"/buckets/me/store/resolve/{quote(name, safe='')}"] = lambda request, name=name: request.answer(
                302, Location=f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{quote(name)}"
            )
    remote = manifest(root, shards="hf://buckets/me/store/of me", loader__cache=str(tmp_path / "cache"))
    assert batches(remote) == batches(manifest(root))
    asked = [("authorization" in headers, path.startswith("/buckets/")) for path, headers in hub.asked]
    assert {(True, True), (False, False)} == set(asked)
    with pytest.raises(ShardsError, match="^hf://buckets/me/none/build.json: .*404 Not Found"):
        Index.open("hf://buckets/me/none", ReadOptions(cache=str(tmp_path / "cache")))
    with pytest.raises(ShardsError, match="hf://buckets/me: not hf://buckets/OWNER/NAME/PATH"):
        Index.open("hf://buckets/me", ReadOptions(cache=str(tmp_path / "cache")))


@pytest.mark.parametrize(
    "address, text",
    [
        ("hf://datasets/me/other/shards", "no such dataset, or it is private; accept .* set HF_TOKEN"),
        ("hf://datasets/me/data@v9/shards", "the dataset has no revision v9"),
        ("hf://datasets/me/gated/shards", "is gated; accept .* set HF_TOKEN"),
        ("hf://datasets/me/data/other/", "404 Not Found .*no finished shards"),
    ],
)
def test_what_is_not_there_is_named(hub, tmp_path, address, text):
    codes = {
        "other/revision/main": "RepoNotFound",
        "data/revision/v9": "RevisionNotFound",
        "gated/revision/main": "GatedRepo",
    }
    for path, code in codes.items():
        hub.routes[f"/api/datasets/me/{path}"] = lambda request, code=code: request.answer(404, X_Error_Code=code)
    with pytest.raises(ShardsError, match=f"^{address.rstrip('/')}[:/].*{text}"):
        Index.open(address, ReadOptions(cache=str(tmp_path / "cache")))


@pytest.mark.parametrize(
    "status, text",
    [
        (401, r"the hub refuses to read it \(401\); .*set HF_TOKEN to a token that may read it"),
        (403, r"the hub refuses to read it \(403\); .*set HF_TOKEN to a token that may read it"),
        (404, "no such dataset, or it is private; .*set HF_TOKEN"),
        (500, "the hub answers 500; try again later"),
    ],
)
def test_a_refusal_does_not_blame_the_network(hub, tmp_path, status, text):
    hub.routes["/api/datasets/me/data/revision/main"] = lambda request: request.answer(
        status, body=b'{"error": "Invalid credentials in Authorization header"}'
    )
    with pytest.raises(ShardsError, match=f"^hf://datasets/me/data/shards: {text}") as error:
        Index.open("hf://datasets/me/data/shards", ReadOptions(cache=str(tmp_path / "cache")))
    assert "network" not in str(error.value)


def test_a_hub_that_is_not_there_is_named(monkeypatch, tmp_path):
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ShardsError, match="^hf://datasets/me/data: the hub cannot be reached .*HF_ENDPOINT"):
        Index.open("hf://datasets/me/data", ReadOptions(cache=str(tmp_path / "cache")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ShardsError, match="^hf://datasets/me/data: HF_HUB_OFFLINE is set; unset it"):
        Index.open("hf://datasets/me/data", ReadOptions(cache=str(tmp_path / "cache")))
