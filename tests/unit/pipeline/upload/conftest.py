"""A small root of the builder, and a hub and an S3 on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.corpora.small_build import build_root
from tests.helpers.servers.s3_server import s3_environment, s3_server
from tests.helpers.servers.upload_hub import UploadHub, upload_hub


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A finished root; nobody writes to it."""
    return build_root(tmp_path_factory.mktemp("built"))


@pytest.fixture
def root(built, tmp_path) -> Path:
    """A copy of the root, with files that the format does not name."""
    copied = shutil.copytree(built, tmp_path / "root")
    (copied / "index" / "tokens-1-2.arrow").write_text("a token cache")
    (copied / "notes.txt").write_text("mine")
    return copied


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> UploadHub:
    """An empty hub, which huggingface_hub asks."""
    (tmp_path / "xet").mkdir()
    with upload_hub(tmp_path / "xet") as running:
        running.point_at(monkeypatch)
        yield running


@pytest.fixture(scope="session")
def s3_url() -> str:
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(s3_url, tmp_path, monkeypatch):
    """An empty bucket ``films`` of boto3, which the environment leads to."""
    import boto3

    for name, value in s3_environment(s3_url, tmp_path).items():
        monkeypatch.setenv(name, value)
    found = boto3.resource("s3", endpoint_url=s3_url).Bucket("films")
    found.create()
    yield found
    found.objects.delete()
    found.delete()
