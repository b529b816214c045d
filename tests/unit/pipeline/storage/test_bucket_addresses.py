"""Roots in buckets: moto's S3, and Google and Azure of this machine, which check the signatures of addresses."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from urllib.parse import urlsplit

import obstore
import pytest

from framestream.pipeline import ShardsError
from framestream.pipeline.shards.index import Index
from framestream.pipeline.storage import ReadOptions, bucket_addresses, open_storage
from framestream.pipeline.storage.buckets import open_bucket_store, processes
from tests.helpers.corpora.batches import batches
from tests.helpers.corpora.small_root import manifest
from tests.helpers.servers.cloud_server import TOKEN, cloud_server
from tests.helpers.servers.s3_server import put_objects, s3_environment, s3_server


@pytest.fixture(scope="module", params=["s3", "gs", "az"])
def cloud(request, root, tmp_path_factory):
    """Scheme and variables of a cloud that has the root under shards/of me/."""
    scheme = request.param
    with s3_server() if scheme == "s3" else cloud_server(scheme) as server, pytest.MonkeyPatch.context() as patch:
        variables = s3_environment(server, Path("/none")) if scheme == "s3" else server.environment()
        for name, text in variables.items():
            patch.setenv(name, text)
        if scheme == "s3":
            put_objects(server, "shards", {})
        store = open_bucket_store(f"{scheme}://shards/of me")
        for path in (root / "stage2").rglob("*"):
            if path.is_file():
                obstore.put(store, path.relative_to(root).as_posix(), path.read_bytes())
        yield scheme, variables, server


@pytest.fixture
def bucket(cloud, monkeypatch):
    for name, text in cloud[1].items():
        monkeypatch.setenv(name, text)
    return f"{cloud[0]}://shards/of me"


@pytest.mark.parametrize("access", ["ranges", "sequential"])
def test_batches_are_those_of_the_folder(bucket, root, tmp_path, access):
    options = {"loader__cache": str(tmp_path / "cache"), "loader__access": access, "loader__cache_gb": 0.1}
    assert batches(manifest(root, shards=bucket, **options)) == batches(manifest(root))


def test_addresses_are_signed_once_and_not_shown(bucket, tmp_path, monkeypatch):
    storage = open_storage(f"{bucket}/stage2/", ReadOptions(cache=str(tmp_path / "cache")))
    address = storage._resolver.address("video/train-000000.tar")
    assert address.display_url == f"{bucket}/stage2/video/train-000000.tar"
    assert "ignature=" in address.url or "sig=" in address.url
    assert storage._resolver.address("video/train-000000.tar") is address
    with pytest.raises(FileNotFoundError, match=f"^{bucket}/stage2/nothing.json: "):
        storage.read_all("nothing.json")
    now = bucket_addresses.time.monotonic()
    monkeypatch.setattr(bucket_addresses.time, "monotonic", lambda: now + 6 * 3600)
    assert storage._resolver.address("video/train-000000.tar") is not address


def test_a_wrong_key_is_refused_with_the_variable(bucket, cloud, tmp_path, monkeypatch):
    if bucket.startswith("s3"):
        pytest.skip("moto checks no signatures")
    wrong = {"AZURE_STORAGE_ACCOUNT_KEY": "b3RoZXI=", "GOOGLE_SKIP_SIGNATURE": "true"}
    for name, text in wrong.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ShardsError) as error:
        Index.open(f"{bucket}/stage2", ReadOptions(cache=str(tmp_path / "cache")))
    text = str(error.value)
    assert text.startswith(f"{bucket}/stage2/build.json: ") and "403" in text and "sig" not in text.lower()
    assert "AZURE_STORAGE_ACCOUNT_KEY" in text or "GOOGLE_APPLICATION_CREDENTIALS" in text


def test_what_is_not_there_is_named(bucket, tmp_path):
    root = bucket.replace("of me", "none")
    with pytest.raises(ShardsError, match=f"^{root}/build.json: .*404 Not Found.*no finished shards$"):
        Index.open(root, ReadOptions(cache=str(tmp_path / "cache")))


@pytest.mark.parametrize("cloud", ["gs"], indirect=True)
def test_a_google_login_without_a_key_sends_its_token(cloud, root, tmp_path, monkeypatch):
    for name in cloud[1]:
        monkeypatch.delenv(name, raising=False)
    for name, text in cloud[2].token_environment(tmp_path).items():
        monkeypatch.setenv(name, text)
    cloud[2].asked.clear()
    storage = open_storage("gs://shards/of me/stage2", ReadOptions(cache=str(tmp_path / "cache")))
    assert storage.read_all("build.json") == (root / "stage2" / "build.json").read_bytes()
    address = storage._resolver.address("build.json")
    assert address.headers == {"Authorization": f"Bearer {TOKEN}"} and "?" not in address.url
    store = open_bucket_store("gs://shards/of me")
    obstore.put(store, "other.json", b"{}")
    assert [item.name for item in storage._resolver._bucket.files("of me")] == ["other.json"]
    assert cloud[2].asked.count("/token") == 2, "a token for each login, not for each request"
    now = bucket_addresses.time.monotonic()
    monkeypatch.setattr(bucket_addresses.time, "monotonic", lambda: now + 200)
    assert storage._resolver.address("build.json") is not address


def read_in_child(storage, pipe):
    """Read a file that the parent has read; sign and list again."""
    resolver = storage._resolver
    resolver._signed.clear()
    found = [storage.read_all("build.json"), resolver._bucket.files("of me/stage2/video")]
    with pytest.raises(ValueError, match="rename it"):
        resolver.address("a//b")
    pipe.send([*found, urlsplit(resolver.address("a").url).query])
    pipe.close()


def test_a_forked_process_signs_and_lists(bucket, root, tmp_path):
    """The threads of obstore are in the parent only: a child that used them would wait for ever."""
    storage = open_storage(f"{bucket}/stage2", ReadOptions(cache=str(tmp_path / "cache")))
    listed = storage._resolver._bucket.files("of me/stage2/video")
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=read_in_child, args=(storage, there), daemon=True)
    child.start()
    there.close()
    assert here.poll(60), "the child waits"
    data, files, query = here.recv()
    child.join(10)
    assert child.exitcode == 0 and data == (root / "stage2" / "build.json").read_bytes()
    assert len(files) > 1 and files == listed and ("Signature=" in query or "sig=" in query)
    assert processes._process._started is None, "the parent needs no process beside it"


@pytest.mark.parametrize(
    ("address", "endpoint", "fix"),
    [
        ("http://127.0.0.1:9/x", "", "check the address and the network"),
        ("http://framestream.invalid/x", "", "check the address and the network"),
        (
            "s3://shards/x",
            "http://127.0.0.1:9",
            "check the name of the bucket, AWS_REGION, AWS_ENDPOINT_URL and .*network",
        ),
    ],
)
def test_a_server_that_is_not_there_is_named_with_the_fix(monkeypatch, tmp_path, address, endpoint, fix):
    for name, text in {
        "ENDPOINT_URL": endpoint,
        "ACCESS_KEY_ID": "me",
        "SECRET_ACCESS_KEY": "x",
        "REGION": "a",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", text)
    with pytest.raises(ShardsError, match=f"^{address}/build.json: the server cannot be reached .*; {fix}"):
        Index.open(address, ReadOptions(cache=str(tmp_path / "cache"), retries=0))
