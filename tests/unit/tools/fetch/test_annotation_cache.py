"""Remote annotation files: how they are named, and that they are fetched once and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framestream.pipeline.config.manifest import ManifestError
from framestream.tools.fetch.annotation_cache import AnnotationCache, remote_file
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.host_health import SourcePool
from tests.helpers.servers.web_server import QUICK, Server

HUB = "https://huggingface.co/datasets"


@pytest.mark.parametrize(
    ("name", "location", "path"),
    [
        ("hf:a/b:annotations/x.json", "hf:a/b", "annotations/x.json"),
        ("hf:a/b@v1:x.json", "hf:a/b@v1", "x.json"),
        ("hf:models/a/b:x.json", "hf:models/a/b", "x.json"),
        (f"{HUB}/a/b.c/resolve/main/d/x.json?download=true", "hf:a/b.c", "d/x.json"),
        (f"{HUB}/a/b/tree/main/d/x.json", "hf:a/b", "d/x.json"),
        (f"{HUB}/a/b/blob/refs%2Fpr%2F1/x%20y.json", "hf:a/b@refs/pr/1", "x y.json"),
        (f"{HUB}/lmms-lab/M4-Instruct-Data/m4.json", "hf:lmms-lab/M4-Instruct-Data", "m4.json"),
        ("s3://bucket/d/x.jsonl.zst", "s3://bucket/d", "x.jsonl.zst"),
        ("gs://bucket/x.json", "gs://bucket", "x.json"),
        ("az://box/d/x.json", "az://box/d", "x.json"),
        ("https://a.org/d/x%20y.json?v=2", "url:https://a.org/d/{name}?v=2", "x y.json"),
        (
            "https://huggingface.co/a/b/resolve/main/x.json",
            "url:https://huggingface.co/a/b/resolve/main/{name}",
            "x.json",
        ),
    ],
)
def test_remote_names(name, location, path):
    assert remote_file(name) == (location, path)


@pytest.mark.parametrize("name", ["data/x.json", "/data/x.json", "hf/x.json", "c:x.json"])
def test_local_names(name):
    assert remote_file(name) is None


@pytest.fixture
def server():
    with Server() as server:
        server.routes["/d/x%20y.json"] = lambda request: request.serve(b"[1, 2, 3]")
        yield server


def fetch(server, folder: Path, name: str = "d/x%20y.json?v=2") -> Path:
    return AnnotationCache(folder, SourcePool(QUICK), QUICK).fetch(*remote_file(f"{server.url}/{name}"))


def test_a_file_is_fetched_once_and_kept_under_its_name(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.name == "x y.json" and path.read_bytes() == b"[1, 2, 3]" and path.is_relative_to(tmp_path)
    count = len(server.asked)
    assert fetch(server, tmp_path) == path and len(server.asked) == count
    record = json.loads((path.parent / "fetched.json").read_bytes())
    assert (record["bytes"], record["path"]) == (9, "x y.json")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_kept_file_needs_no_server(server, tmp_path):
    path = fetch(server, tmp_path)
    server.routes.clear()
    assert fetch(server, tmp_path) == path


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    path = fetch(server, tmp_path)
    path.write_bytes(b"[1, 2, 4]")
    assert fetch(server, tmp_path).read_bytes() == b"[1, 2, 3]"


def test_what_is_missing_leaves_nothing(server, tmp_path):
    with pytest.raises(FetchError) as caught:
        fetch(server, tmp_path, "d/other.json")
    assert caught.value.reason == "missing_file"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "annotations").write_text("a file in the way")
    with pytest.raises(ManifestError, match="data.cache: "):
        fetch(server, tmp_path)


def test_two_files_of_one_name_are_two(server, tmp_path):
    server.routes["/e/x%20y.json"] = lambda request: request.serve(b"[]")
    assert fetch(server, tmp_path).read_bytes() == b"[1, 2, 3]"
    assert fetch(server, tmp_path, "e/x%20y.json?v=2").read_bytes() == b"[]"


@pytest.mark.parametrize("record", ["", "{}", "[]", "5", '{"sha256": 5}', '{"sha256": null}', "[" * 9999, "\ud800"])
def test_a_damaged_record_has_its_file_fetched_again(server, tmp_path, caplog, record):
    path = fetch(server, tmp_path)
    (path.parent / "fetched.json").write_bytes(record.encode("utf-8", "surrogatepass"))
    caplog.clear()
    count = len(server.asked)
    assert fetch(server, tmp_path).read_bytes() == b"[1, 2, 3]" and len(server.asked) > count
    assert [line for line in caplog.messages if line.endswith("; it is fetched again")]
