"""Buckets of moto's S3 server on the loopback interface."""

from __future__ import annotations

import random
import sys

import pytest
import s3fs

import framestream.tools.fetch.object_listing
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.registry import open_files, open_source
from framestream.tools.fetch.s3 import open_s3
from tests.helpers.servers.s3_server import s3_environment, s3_server
from tests.helpers.servers.web_server import QUICK

DATA = random.Random(0).randbytes(200_000)
FILES = {
    "v/a b+c.mp4": DATA,
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
        yield address


@pytest.fixture
def bucket(endpoint, monkeypatch, tmp_path):
    """Put FILES into s3://videos, and credentials into the environment."""
    for name, text in s3_environment(endpoint, tmp_path).items():
        monkeypatch.setenv(name, text)
    system = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)
    if system.exists("videos"):
        system.rm("videos", recursive=True)
    system.mkdir("videos")
    for name, data in FILES.items():
        system.pipe_file(f"videos/{name}", data)
    return system


def test_files_are_found_and_fetched(bucket, tmp_path):
    source = open_source("s3://videos/v", QUICK)
    assert (
        source.find("a b+c.mp4") == len(DATA) and source.find("none.mp4") is None and source.find("no/ne.mp4") is None
    )
    assert source.find("frames") is None, "a folder is no file"
    path = source.fetch("a b+c.mp4", tmp_path)
    assert path.read_bytes() == DATA and path.suffix == ".mp4"
    with pytest.raises(FetchError) as error:
        source.fetch("none.mp4", tmp_path)
    assert error.value.reason == "missing_file"


def test_folders_of_frames(bucket, tmp_path):
    source = open_source("s3://videos/v/", QUICK)
    assert source.find("frames", tree=True) == 6 and source.find("none", tree=True) is None
    folder = source.fetch("frames", tmp_path, tree=True)
    assert {item.name: item.read_bytes() for item in folder.iterdir()} == {"1.jpg": b"one", "2.jpg": b"two"}


def test_listings_of_many_pages(bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    for number in range(7):
        bucket.pipe_file(f"videos/many/{number}.txt", b"x")
    assert len(bucket.call_s3("list_objects_v2", Bucket="videos", Prefix="many/")["Contents"]) == 2
    assert open_source("s3://videos", QUICK).find("many", tree=True) == 7


def test_identity_follows_the_contents(bucket):
    before = open_source("s3://videos/v", QUICK).identity("frames/1.jpg")
    bucket.pipe_file("videos/v/frames/1.jpg", b"ONE")
    assert before and open_source("s3://videos/v", QUICK).identity("frames/1.jpg") != before


def test_parts_of_archives(bucket):
    small, large = open_files("s3://videos/zip/*.zip", QUICK)
    assert [small.read(0, 9), large.read(0, 9)] == [b"2", b"10"]
    (file,) = open_files("s3://videos/v/a b+c.mp4", QUICK)
    assert file.size == len(DATA) and file.read(150_000, 20) == DATA[150_000:150_020]
    bucket.pipe_file("videos/v/a b+c.mp4", DATA[::-1])
    with pytest.raises(FetchError, match="changed"):
        file.read(0, 20)


def test_a_large_folder_is_asked_for_one_by_one(bucket, monkeypatch):
    monkeypatch.setattr(framestream.tools.fetch.object_listing, "MAX_CACHED_FILES", 1)
    source = open_source("s3://videos/v/frames", QUICK)
    assert source.find("1.jpg") == 3 and source.find("4.jpg") is None


def test_a_public_bucket_needs_no_credentials(bucket, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    source = open_source("s3://videos/v", QUICK)
    assert source.find("a b+c.mp4") == len(DATA)
    with pytest.raises(FetchError, match="AWS_PROFILE") as error:
        source.fetch("a b+c.mp4", tmp_path)
    assert error.value.reason == "denied"
    bucket.chmod("videos/v/a b+c.mp4", "public-read")
    assert source.fetch("a b+c.mp4", tmp_path).read_bytes() == DATA


def test_no_such_bucket_and_no_server(bucket, monkeypatch):
    with pytest.raises(FetchError) as error:
        open_source("s3://nowhere/v", QUICK).find("a")
    assert error.value.reason == "missing_file"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(FetchError) as error:
        open_source("s3://videos/v", QUICK).find("a")
    assert error.value.reason == "unreachable" and "127.0.0.1" not in str(error.value)


def test_without_s3fs_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(FetchError, match=r"pip install -e '.\[s3\]'"):
        open_s3("s3://videos/v", QUICK)
    with pytest.raises(ValueError):
        open_s3("s3:/videos", QUICK)
