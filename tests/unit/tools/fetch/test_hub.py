"""Hub repositories against a small hub on the loopback interface that answers as the real one does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import framestream.tools.fetch.object_listing
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.hub import open_hub
from tests.helpers.servers.fetch_hub import COMMIT, blob, serve_hub
from tests.helpers.servers.web_server import QUICK, turns

FILES = {
    "video/a b.mp4": b"small",
    "video/large.mp4": b"large" * 20_000,
    "video/frames/2.jpg": b"two",
    "video/frames/10.jpg": b"ten!",
    "video/frames/deep/3.jpg": b"not directly",
    "zip/part_2.zip": b"2",
    "zip/part_10.zip": b"10",
    "zip/readme.md": b"",
    "top.json": b"[]",
}


@pytest.fixture
def hub(server):
    """Serve FILES as datasets/me/data, two files on a page. `large` is in LFS behind a redirect."""
    server.files = dict(FILES)
    serve_hub(server, server.files)
    return server


def opened(hub, location="hf:me/data:video"):
    return open_hub(location, QUICK, hub.url)


def test_files_are_found_by_one_listing_a_folder_and_fetched(hub, tmp_path):
    source = opened(hub)
    assert source.origin == f"hf:me/data@{COMMIT}:video"
    before = len(hub.asked)
    for _ in range(20):
        assert source.find("a b.mp4") == 5 and source.find("large.mp4") == 100_000
        assert source.find("c.mp4") is None and source.find("none/x.mp4") is None
    assert len(hub.asked) - before == 3  # two pages of one folder, and one folder that is not there
    for name in ("a b.mp4", "large.mp4"):
        (tmp_path / name).mkdir()
        path = source.fetch(name, tmp_path / name)
        assert path.read_bytes() == FILES[f"video/{name}"] and path.suffix == ".mp4"
    assert source.identity("large.mp4") == hashlib.sha256(FILES["video/large.mp4"]).hexdigest()
    assert source.identity("a b.mp4") == blob(b"small")


def test_threads_share_a_listing(hub):
    source = opened(hub)
    before = len(hub.asked)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.find, ["a b.mp4", "large.mp4", "c.mp4"] * 16)) == [5, 100_000, None] * 16
    assert len(hub.asked) - before == 2, "the pages of one folder"


def test_folders_of_frames(hub, tmp_path):
    source = opened(hub)
    assert source.find("frames", tree=True) == 7 and source.find("none", tree=True) is None
    folder = source.fetch("frames", tmp_path, tree=True)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == {"2.jpg": b"two", "10.jpg": b"ten!"}
    identity = source.identity("frames", tree=True)
    hub.files["video/frames/2.jpg"] = b"TWO"
    assert opened(hub).identity("frames", tree=True) != identity


def test_the_commit_is_asked_for_once_and_named_in_the_origin(hub):
    source = opened(hub, "hf:me/data@refs/pr/1:video")
    again = opened(hub, source.origin)
    assert again.origin == source.origin and again.find("a b.mp4") == 5
    assert [path for path, _ in hub.asked if "/revision/" in path] == ["/api/datasets/me/data/revision/refs%2Fpr%2F1"]


def test_contents_are_checked(hub, tmp_path):
    source = opened(hub)
    assert source.find("a b.mp4") and source.find("large.mp4")
    hub.files |= {"video/a b.mp4": b"smell", "video/large.mp4": b"Large" * 20_000}
    for name in ("a b.mp4", "large.mp4"):
        with pytest.raises(FetchError) as error:
            source.fetch(name, tmp_path)
        assert error.value.reason == "bad_checksum" and "secret" not in str(error.value)


def test_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.routes["/cdn/me/data/video/large.mp4"] = lambda request: request.answer(403)
    with pytest.raises(FetchError) as error:
        opened(hub).fetch("large.mp4", tmp_path)
    assert error.value.reason == "denied" and "HF_TOKEN" in str(error.value) and "hf_secret" not in str(error.value)
    sent = {headers.get("authorization") for path, headers in hub.asked if path.startswith("/api")}
    assert sent == {"Bearer hf_secret"}


def test_folders_too_large_to_list_are_asked_file_by_file(hub, monkeypatch):
    monkeypatch.setattr(framestream.tools.fetch.object_listing, "MAX_CACHED_FILES", 1)
    source = opened(hub)
    assert source.find("a b.mp4") == 5 and source.find("large.mp4") == 100_000 and source.find("c.mp4") is None
    with pytest.raises(FetchError) as error:
        source.find("frames", tree=True)
    assert error.value.reason == "too_large"


def test_listings_that_are_kept_are_bounded(hub, monkeypatch):
    monkeypatch.setattr(framestream.tools.fetch.object_listing, "MAX_CACHED_FILES", 4)
    source = opened(hub, "hf:me/data")
    for _ in range(3):
        assert (
            source.find("video/a b.mp4") == 5
            and source.find("video/frames/2.jpg") == 3
            and source.find("top.json") == 2
        )
        assert sum(1 + len(items) for items in source._listings.values()) <= 4


def test_refusals(hub, tmp_path):
    answers = [(404, b""), (401, b""), (200, b"<html>")]
    routes = [lambda request, answer=answer: request.answer(*answer) for answer in answers]
    hub.routes["/api/datasets/me/data/revision/main"] = turns(*routes)
    reasons = []
    for _ in range(3):
        with pytest.raises(FetchError) as error:
            opened(hub)
        reasons.append((error.value.reason, "set HF_TOKEN to a token that may read it" in str(error.value)))
    assert reasons == [("denied", True), ("denied", True), ("unreachable", False)]
    with pytest.raises(FetchError) as error:
        opened(hub, f"hf:me/data@{COMMIT}:video").fetch("c.mp4", tmp_path)
    assert error.value.reason == "missing_file"
    for bad in ("hf:data", "hf:me/data/video", "hf:me/../x", "hf:me/data@a b"):
        with pytest.raises(ValueError):
            opened(hub, bad)


@pytest.mark.parametrize("path", ["../top.json", "/etc/passwd", "a//b", "frames/../../top.json", "."])
def test_paths_stay_below_the_folder(hub, tmp_path, path):
    with pytest.raises(FetchError) as error:
        opened(hub).fetch(path, tmp_path)
    assert error.value.reason == "outside_root"


@pytest.mark.parametrize("name", ["..", "x\0y", "n" * 300])
def test_names_that_a_hub_makes_up_write_nothing_outside(hub, tmp_path, name):
    entry = {"type": "file", "path": "video/frames/" + name, "oid": blob(b"x"), "size": 1}
    hub.routes[f"/api/datasets/me/data/tree/{COMMIT}/video/frames"] = lambda request: request.answer(
        body=json.dumps([entry]).encode()
    )
    (tmp_path / "scratch").mkdir()
    with pytest.raises(FetchError) as error:
        opened(hub).fetch("frames", tmp_path / "scratch", tree=True)
    assert error.value.reason == "outside_root"
    assert [item.name for item in tmp_path.iterdir()] == ["scratch"]


def test_the_next_page_is_asked_of_the_same_endpoint(hub):
    """Mirrors return links to the hub that they mirror."""
    api = f"/api/datasets/me/data/tree/{COMMIT}/none"
    pages = [[], [{"type": "file", "path": "none/x", "oid": blob(b"x"), "size": 1}]]
    hub.routes[api] = lambda request: request.answer(
        body=json.dumps(pages["cursor=1" in request.path]).encode(),
        **({} if "cursor" in request.path else {"Link": f'<http://127.0.0.2:9{api}?cursor=1>; rel="next"'}),
    )
    assert opened(hub, "hf:me/data").find("none/x") == 1


@pytest.mark.parametrize("path", ["a\ud800/b.mp4", "\udc80.mp4"])
def test_paths_that_are_no_text_are_not_there(hub, tmp_path, path):
    source = opened(hub)
    assert source.find(path) is None and source.find(path, tree=True) is None
    with pytest.raises(FetchError) as error:
        source.fetch(path, tmp_path)
    assert error.value.reason == "missing_file" and str(error.value).isprintable()


def test_models_and_the_endpoint_of_the_environment(hub, tmp_path):
    hub.routes |= {
        "/api/models/me/net/revision/main": hub.routes["/api/datasets/me/data/revision/main"],
        f"/api/models/me/net/tree/{COMMIT}": lambda request: request.answer(
            body=json.dumps([{"type": "file", "path": "a", "oid": blob(b"A"), "size": 1}]).encode()
        ),
        f"/me/net/resolve/{COMMIT}/a": lambda request: request.serve(b"A"),
    }
    program = """
import pathlib, sys
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.registry import open_source
source = open_source("hf:models/me/net", FetchLimits())
print(source.origin, source.fetch("a", pathlib.Path(sys.argv[1])).read_text())
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", program, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [f"hf:models/me/net@{COMMIT}:", "A"], ran.stderr


@pytest.mark.parametrize(
    "listing",
    [
        *(b"5", b"[5]", b"[null]", b'[{"type": "file"}]', b'[{"type": "file", "path": 5}]', b"[" * 9999),
        b'[{"type": "file", "path": "a", "size": "x", "oid": ""}]',
    ],
)
def test_listings_that_are_none_are_told(server, listing):
    commit = "a" * 40
    server.routes[f"/api/datasets/me/data/tree/{commit}/v"] = lambda request: request.serve(listing)
    source = open_hub(f"hf:me/data@{commit}:v", QUICK, server.url)
    with pytest.raises(FetchError) as error:
        source.find("a.mp4")
    assert error.value.reason == "unreachable" and "the response of the hub is not" in str(error.value)
