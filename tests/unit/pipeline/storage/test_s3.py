"""A root in a bucket of moto's S3 server."""

from __future__ import annotations

import pytest
import s3fs

from framestream.pipeline import ShardsError
from framestream.pipeline.shards.index import Index
from framestream.pipeline.storage import ReadOptions, open_storage
from tests.helpers.corpora.batches import batches
from tests.helpers.corpora.small_root import manifest
from tests.helpers.servers.s3_server import s3_environment, s3_server


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint, root, monkeypatch, tmp_path):
    """The root under s3://shards/of me/, and credentials in the environment."""
    for name, text in s3_environment(endpoint, tmp_path).items():
        monkeypatch.setenv(name, text)
    system = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
    if not system.exists("shards"):
        system.mkdir("shards")
    for path in (root / "stage2").rglob("*"):
        if path.is_file():
            system.pipe_file(f"shards/of me/{path.relative_to(root).as_posix()}", path.read_bytes())
    return "s3://shards/of me"


def test_batches_are_those_of_the_folder(bucket, root, tmp_path):
    remote = manifest(root, shards=bucket, loader__cache=str(tmp_path / "cache"))
    assert batches(remote) == batches(manifest(root))


def test_addresses_are_signed_once_and_not_shown(bucket, tmp_path):
    storage = open_storage(f"{bucket}/stage2/", ReadOptions(cache=str(tmp_path / "cache")))
    address = storage._resolver.address("video/train-000000.tar")
    assert "X-Amz-Signature=" in address.url and "X-Amz-Signature" not in address.display_url
    assert storage._resolver.address("video/train-000000.tar") is address
    assert storage.read_all("build.json")
    with pytest.raises(FileNotFoundError):
        storage.read_all("nothing.json")


def test_without_credentials_the_bucket_is_asked_as_anybody(bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = open_storage(f"{bucket}/stage2", ReadOptions(cache=str(tmp_path / "cache")))
    assert "Signature" not in storage._resolver.address("build.json").url


def test_what_is_not_there_is_named(bucket, tmp_path):
    with pytest.raises(ShardsError, match="^s3://shards/none/build.json: .*404 Not Found.*no finished shards$"):
        Index.open("s3://shards/none", ReadOptions(cache=str(tmp_path / "cache")))
