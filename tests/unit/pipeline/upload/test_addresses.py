"""Targets of uploads: addresses that are nearly right, and servers that cannot be reached."""

from __future__ import annotations

import time
import types

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from framestream.pipeline.storage.buckets import stores
from framestream.pipeline.upload.addresses import open_target
from framestream.pipeline.upload.files import RefusedError, UploadError


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("https://huggingface.co/datasets/me/data", "hf://datasets/me/data"),
        ("https://huggingface.co/datasets/me/data/tree/main/stage3", "hf://datasets/me/data"),
        ("huggingface.co/buckets/me/data/", "hf://buckets/me/data"),
        ("https://hf.co/datasets/me/data", "hf://datasets/me/data"),
        ("me/data", "hf://datasets/me/data"),
        ("hf://me/data", "hf://datasets/me/data"),
        ("hf:me/data", "hf://datasets/me/data"),
        ("hf://datasets/data", ""),
        ("hf://models/data", ""),
        ("https://example.org/me/data", ""),
        ("ftp://me/data", ""),
    ],
)
def test_an_address_that_is_nearly_right_is_told(url, meant):
    with pytest.raises(RefusedError) as error:
        open_target(url)
    end = f"; did you mean {meant}?" if meant else "az://CONTAINER/PATH"
    assert str(error.value).startswith(f"{url}: not hf://") and str(error.value).endswith(end)


@pytest.mark.parametrize("url", ["hf://datasets/me/data", "hf://buckets/me/data"])
def test_a_hub_that_is_not_used_or_not_there(url, monkeypatch):
    without_waits = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", without_waits)  # of huggingface_hub, between its tries
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UploadError, match=f"^{url}: .*; check the network and HF_ENDPOINT, and run the command again"):
        open_target(url).list_files([])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RefusedError, match=f"^{url}: HF_HUB_OFFLINE is set; unset it"):
        open_target(url).list_files([])


def test_a_cloud_that_is_not_there(monkeypatch):
    monkeypatch.setitem(stores.RETRIES, "max_retries", 0)
    for name, text in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(f"AWS_{name}", text)
    fix = "check the name of the bucket, AWS_REGION, AWS_ENDPOINT_URL and the network, and run the command again"
    with pytest.raises(UploadError, match=rf"^s3://films/a: .*\(the server cannot be reached\); {fix}"):
        open_target("s3://films/a").list_files([])
