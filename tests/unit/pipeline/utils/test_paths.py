"""Paths as people write them: a home folder and variables are expanded, or refused by name."""

from __future__ import annotations

import os

import pytest

from framestream.pipeline.utils.paths import PathError, expand_path, missing_slash


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FS_A", "a b")
    monkeypatch.setenv("FS_EMPTY", "")


@pytest.mark.parametrize(
    "text",
    [
        "~",
        "~/x",
        "$FS_A/x",
        "${FS_A}x",
        "x/$FS_A$FS_A",
        "x~",
        "a/~/b",
        "",
        "x",
        "100$",
        "$ x",
        "$1",
        "é/ü",
        "a\u3000b",
        "\udcff",
    ],
)
def test_paths_are_what_a_shell_makes_of_them(text):
    assert expand_path(text) == os.path.expandvars(os.path.expanduser(text))


@pytest.mark.parametrize("text", ["https://h/~/$FS_A", "s3://b/$X", "hf:o/n:$X", "gs://${X}/~"])
def test_addresses_stay_as_they_are(text):
    assert expand_path(text) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("$FS_NONE/x", "the variable FS_NONE is not set"),
        ("${FS_EMPTY}/x", "the variable FS_EMPTY is not set"),
        ("${FS_NONE:-/tmp}", "the variable FS_NONE:-/tmp is not set"),
        ("${}", "is not set"),
        ("~no-such-user/x", "there is no home folder ~no-such-user; write ./~no-such-user/x"),
        ("a\nb", "control character"),
        ("a\0b", "control character"),
        ("x" * 5000, "over 4,096 characters"),
    ],
)
def test_what_cannot_be_a_path_is_refused(text, reason):
    with pytest.raises(PathError) as caught:
        expand_path(text)
    assert reason in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("address", ["https://example.org/a", "http://h/a", "s3://bucket/a"])
def test_an_address_that_lost_a_slash_is_refused(address):
    lost = os.path.normpath(address)
    assert lost == address.replace("//", "/") and missing_slash(lost) == address and not missing_slash(address)
    with pytest.raises(PathError, match="a slash is missing after the colon; write ") as error:
        expand_path(lost)
    assert str(error.value).endswith(address)
