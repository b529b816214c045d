"""Stores of buckets, their logins and what is said when they are wrong. Nothing is sent."""

from __future__ import annotations

import os
import sys

import pytest

from framestream.pipeline.storage.buckets.stores import BucketCalls, open_bucket_store

PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    """No variable of a cloud is set, and no profile is found."""

    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def login(monkeypatch, **variables):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)


@pytest.mark.parametrize(
    "url, kind",
    [("s3://b/of me/x/", "S3Store"), ("gs://b/of me/x", "GCSStore"), ("az://b/of me/x//", "AzureStore")],
)
def test_a_store_is_that_of_the_path(monkeypatch, url, kind):
    login(monkeypatch, AZURE_STORAGE_ACCOUNT_NAME="me", AZURE_STORAGE_ACCOUNT_KEY="a2V5", GOOGLE_SKIP_SIGNATURE="1")
    store = open_bucket_store(url)
    assert type(store).__name__ == kind and store.prefix == "of me/x"


@pytest.mark.parametrize("url", ["s3:/b", "s3://", "s3:///x", "ftp://b/x", "az://-x", "gs://b c/x"])
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="not s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"):
        open_bucket_store(url)


@pytest.mark.parametrize(
    "url, variables, address",
    [
        ("s3://b", {}, "https://b.s3.amazonaws.com/a%20b/%2B.tar"),
        ("s3://b", {"AWS_REGION": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/b/a%20b/%2B.tar"),
        ("s3://b", {"AWS_ENDPOINT_URL": "https://h:9/"}, "https://h:9/b/a%20b/%2B.tar"),
        (
            "s3://b",
            {"AWS_ENDPOINT_URL_S3": "https://b.h", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"},
            "https://b.h/a%20b/%2B.tar",
        ),
        ("gs://b", {"GOOGLE_SKIP_SIGNATURE": "true"}, "https://storage.googleapis.com/b/a%20b/%2B.tar"),
        (
            "az://b",
            {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_SKIP_SIGNATURE": "true"},
            "https://me.blob.core.windows.net/b/a%20b/%2B.tar",
        ),
        (
            "az://b",
            {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=x"},
            "https://me.blob.core.windows.net/b/a%20b/%2B.tar?sv=1&sig=x",
        ),
    ],
)
def test_addresses_without_a_signature_of_obstore(monkeypatch, url, variables, address):
    login(monkeypatch, **variables)
    assert BucketCalls(url).sign("a b/+.tar") == address


@pytest.mark.parametrize(
    "url, variables, text",
    [
        (
            "s3://b",
            {"AWS_ACCESS_KEY_ID": "me"},
            "s3://b: AWS_ACCESS_KEY_ID is set without its other half; set AWS_ACCESS",
        ),
        ("s3://b", {"AWS_PROFILE": "none"}, "s3://b: The config profile .none. could not be found; .*AWS_PROFILE"),
        ("az://b", {}, "az://b: the storage account is not named; set AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "az://b",
            {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": "&&"},
            "az://b: .*Invalid Access Key.*; set AZURE_STORAGE_ACCOUNT_NAME",
        ),
        ("gs://b", {"GOOGLE_APPLICATION_CREDENTIALS": "none.json"}, "gs://b: none.json: cannot be read .*; set GOOGLE"),
    ],
)
def test_a_wrong_login_is_named_with_its_fix(monkeypatch, url, variables, text):
    login(monkeypatch, **variables)
    with pytest.raises(PermissionError, match=text):
        BucketCalls(url)


def test_profiles_are_read_by_boto3(monkeypatch, tmp_path):
    (tmp_path / "login").write_text("[lab]\naws_access_key_id = lab-key\naws_secret_access_key = s\n")
    (tmp_path / "settings").write_text("[profile lab]\nregion = eu-north-1\nendpoint_url = https://lab:9\n")
    login(
        monkeypatch,
        AWS_PROFILE="lab",
        AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "login"),
        AWS_CONFIG_FILE=str(tmp_path / "settings"),
    )
    address = BucketCalls("s3://b").sign("x")
    assert address.startswith("https://lab:9/b/x?") and "lab-key%2F" in address and "eu-north-1" in address


def test_a_profile_without_boto3_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    login(monkeypatch, AWS_PROFILE="lab")
    with pytest.raises(PermissionError, match=r"AWS_PROFILE is lab: profiles require boto3: pip install -e '.\[s3\]'"):
        open_bucket_store("s3://b")


def test_a_google_login_without_google_auth_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "google.auth", None)
    (tmp_path / "me.json").write_text('{"type": "authorized_user"}')
    login(monkeypatch, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "me.json"))
    with pytest.raises(PermissionError, match=r"^gs://b: .*authorized_user requires google-auth: pip install .*\[gs\]"):
        open_bucket_store("gs://b")


@pytest.mark.parametrize("key", ["", "a//b", "../b", "a/./b", "a/"])
def test_keys_that_obstore_would_change_are_refused(monkeypatch, key):
    login(monkeypatch, AWS_ACCESS_KEY_ID="me", AWS_SECRET_ACCESS_KEY="s")
    with pytest.raises(ValueError, match="^s3://b/.*rename it$"):
        BucketCalls("s3://b").sign(key)
