"""Buckets of moto's S3, and of Google and Azure of this machine, which check the signatures of addresses."""

from __future__ import annotations

import random
from pathlib import Path

import obstore
import pytest

import framestream.tools.fetch.object_listing
from framestream.pipeline.storage.buckets import open_bucket_store, stores
from framestream.tools.fetch.annotation_cache import AnnotationCache
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.buckets import open_bucket
from framestream.tools.fetch.host_health import SourcePool
from framestream.tools.fetch.registry import open_files, open_source
from tests.helpers.servers.cloud_server import cloud_server
from tests.helpers.servers.s3_server import put_objects, s3_client, s3_environment, s3_server
from tests.helpers.servers.web_server import QUICK

DATA = random.Random(0).randbytes(200_000)
FILES = {
    "v/a b+c.mp4": DATA,
    "v/é%2F#?&(.mp4": b"odd",
    "v/frames/1.jpg": b"one",
    "v/frames/2.jpg": b"two",
    "v/frames/x/3.jpg": b"deep",
    "zip/p_10.zip": b"10",
    "zip/p_2.zip": b"2",
    "zip/p.txt": b"",
}


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        put_objects(address, "videos", {"v/frames/": b""})
        yield address


@pytest.fixture(scope="module")
def cloud_servers(endpoint):
    """Variables of all three clouds by scheme, and their servers."""
    with cloud_server("gs") as gs, cloud_server("az") as az:
        yield {
            "s3": (endpoint, s3_environment(endpoint, Path("/none"))),
            "gs": (gs, gs.environment()),
            "az": (az, az.environment()),
        }


@pytest.fixture(params=["s3", "gs", "az"])
def bucket(request, cloud_servers, monkeypatch):
    """Put FILES into SCHEME://videos, and a login into the environment."""
    for name, text in cloud_servers[request.param][1].items():
        monkeypatch.setenv(name, text)
    store = open_bucket_store(f"{request.param}://videos")
    for name, data in FILES.items():
        obstore.put(store, name, data)
    return f"{request.param}://videos"


def test_files_are_found_and_fetched(bucket, tmp_path):
    source = open_source(f"{bucket}/v", QUICK)
    assert source.find("a b+c.mp4") == len(DATA)
    assert source.find("none.mp4") is None and source.find("no/ne.mp4") is None
    assert source.find("frames") is None, "a folder is no file"
    path = source.fetch("a b+c.mp4", tmp_path)
    assert path.read_bytes() == DATA and path.suffix == ".mp4"
    assert source.fetch("é%2F#?&(.mp4", tmp_path).read_bytes() == b"odd"
    with pytest.raises(FetchError) as error:
        source.fetch("none.mp4", tmp_path)
    assert error.value.reason == "missing_file"


def test_folders_of_frames(bucket, tmp_path):
    source = open_source(f"{bucket}/v/", QUICK)
    assert source.find("frames", tree=True) == 6 and source.find("none", tree=True) is None
    folder = source.fetch("frames", tmp_path, tree=True)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == {"1.jpg": b"one", "2.jpg": b"two"}


def test_identity_follows_the_contents(bucket):
    before = open_source(f"{bucket}/v", QUICK).identity("frames/1.jpg")
    obstore.put(open_bucket_store(bucket), "v/frames/1.jpg", b"ONE")
    assert before and open_source(f"{bucket}/v", QUICK).identity("frames/1.jpg") != before


def test_parts_of_archives(bucket):
    small, large = open_files(f"{bucket}/zip/*.zip", QUICK)
    assert [small.read(0, 9), large.read(0, 9)] == [b"2", b"10"]
    (file,) = open_files(f"{bucket}/v/a b+c.mp4", QUICK)
    assert file.size == len(DATA) and file.read(150_000, 20) == DATA[150_000:150_020]
    obstore.put(open_bucket_store(bucket), "v/a b+c.mp4", DATA[::-1])
    with pytest.raises(FetchError, match="changed"):
        file.read(0, 20)


def test_a_large_folder_is_asked_for_one_by_one(bucket, monkeypatch):
    monkeypatch.setattr(framestream.tools.fetch.object_listing, "MAX_CACHED_FILES", 1)
    source = open_source(f"{bucket}/v/frames", QUICK)
    assert source.find("1.jpg") == 3 and source.find("4.jpg") is None


def test_a_public_bucket_needs_no_login(bucket, cloud_servers, monkeypatch, tmp_path):
    scheme = bucket[:2]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY", raising=False)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    variable = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS", "az": "AZURE_STORAGE_ACCOUNT_KEY"}
    with pytest.raises(FetchError, match=variable[scheme]) as error:
        open_source(f"{bucket}/v", QUICK).fetch("a b+c.mp4", tmp_path)
    assert error.value.reason == "denied"
    server = cloud_servers[scheme][0]
    if scheme == "s3":
        s3_client(server).put_object_acl(Bucket="videos", Key="v/a b+c.mp4", ACL="public-read")
    else:
        monkeypatch.setattr(server, "public", True)
    source = open_source(f"{bucket}/v", QUICK)
    assert source.find("a b+c.mp4") == len(DATA)
    assert source.fetch("a b+c.mp4", tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_login_of_google_that_cannot_sign(bucket, cloud_servers, monkeypatch, tmp_path):
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    for name, text in cloud_servers["gs"][0].token_environment(tmp_path).items():
        monkeypatch.setenv(name, text)
    assert open_source("gs://videos/v", QUICK).fetch("a b+c.mp4", tmp_path).read_bytes() == DATA
    source = open_source("gs://videos/v", QUICK)
    (tmp_path / "subject").unlink()
    with pytest.raises(FetchError, match="^gs://videos.*the login cannot be renewed .*GOOGLE_APPLICATION") as error:
        source.fetch("a b+c.mp4", tmp_path)
    assert error.value.reason == "denied"


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_listings_of_many_pages(bucket, endpoint, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for number in range(7):
        obstore.put(open_bucket_store(bucket), f"many/{number}.txt", b"x")
    assert len(s3_client(endpoint).list_objects_v2(Bucket="videos", Prefix="many/")["Contents"]) == 2
    assert open_source("s3://videos", QUICK).find("many", tree=True) == 7


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_no_such_bucket_and_no_server(bucket, monkeypatch, tmp_path):
    monkeypatch.setitem(stores.RETRIES, "max_retries", 0)
    with pytest.raises(FetchError, match="^s3://nowhere/v: no such bucket or object") as error:
        open_source("s3://nowhere/v", QUICK).find("a")
    assert error.value.reason == "missing_file"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(FetchError) as error:
        open_source("s3://videos/v", QUICK).find("a")
    assert error.value.reason == "unreachable" and "127.0.0.1" not in str(error.value)
    fix = "the server cannot be reached; check the name of the bucket, AWS_REGION, AWS_ENDPOINT_URL and the network"
    assert str(error.value).startswith(f"s3://videos/v: {fix}")
    annotations = AnnotationCache(tmp_path, SourcePool(QUICK), QUICK)
    for name in ("first.json", "second.json"):
        with pytest.raises(FetchError, match=f"^s3://videos/v/w {name}: {fix}"):
            annotations.fetch("s3://videos/v/w", name)


def test_half_a_login_is_denied_before_anything_is_read(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(FetchError, match="^s3://videos: AWS_ACCESS_KEY_ID is set without") as error:
        open_bucket("s3://videos/v", QUICK)
    assert error.value.reason == "denied"


@pytest.mark.parametrize("location", ["s3://", "gs://-x/y", "az:box", "s3:///x"])
def test_locations_of_another_form_are_refused(location):
    with pytest.raises(ValueError, match=f"is not {location[:2]}://(BUCKET|CONTAINER)/FOLDER"):
        open_bucket(location, QUICK)
