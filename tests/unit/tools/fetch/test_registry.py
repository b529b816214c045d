"""Locations in the syntax of a root map."""

from __future__ import annotations

import pytest

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.object_listing import name_order
from framestream.tools.fetch.registry import open_files, open_source
from tests.helpers.servers.web_server import QUICK


def test_sources(tmp_path):
    assert open_source(f"dir:{tmp_path}", QUICK).origin == f"dir:{tmp_path}"
    assert open_source("url:https://me:pw@h/{path}", QUICK).origin == "url:https://h/{path}"
    assert open_source("page:https://h/?v={stem}", QUICK).origin == "page:https://h/?v={stem}"


@pytest.mark.parametrize(
    "location",
    ["", "/data", "dir:", "dir:/no/such/folder", "url:https://h/x", "page:x", "hf:a", "s3:/x", "https://h/{path}", "ftp://h"],
)  # fmt: skip
def test_invalid_locations(location):
    with pytest.raises(ValueError) as error:
        open_source(location, QUICK)
    assert "\n" not in str(error.value)


def test_files_come_in_name_order_location_by_location(tmp_path, server):
    for name in ("p_10.zip", "p_2.zip", "p_1.txt", "[x].zip"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "p_3.zip").mkdir()
    server.routes["/a.zip"] = lambda request: request.serve(b"from the web")
    files = open_files([f"url:{server.url}/a.zip", f"dir:{tmp_path}/p_*.zip", f"dir:{tmp_path}/[x].zip"], QUICK)
    assert [file.read(0, 99) for file in files] == [b"from the web", b"p_2.zip", b"p_10.zip", b"[x].zip"]
    with pytest.raises(FetchError) as error:
        open_files(f"dir:{tmp_path}/*.tar", QUICK)
    assert error.value.reason == "missing_file"


@pytest.mark.parametrize(
    "location", ["dir:/*/x.zip", "dir:/tmp/", "page:https://h/{stem}", "hf:a/b:c*/x.zip", "s3://x", "x.zip"]
)
def test_locations_that_cannot_contain_archives(location):
    with pytest.raises(ValueError):
        open_files(location, QUICK)


def test_names_sort_with_their_numbers():
    """Names as split(1) writes them, padded or not, with letters or digits."""
    for names in (
        ["x.z01", "x.z02", "x.z10"],
        ["p1.zip", "p2.zip", "p10.zip"],
        ["xaa", "xab", "xzaaa"],
        ["x89", "x9000"],
    ):
        assert sorted(reversed(names), key=name_order) == names


@pytest.mark.parametrize(
    ("location", "meant"),
    [
        ("url:https:/me:secret@example.org/{path}", "url:https://example.org/{path}"),
        ("page:http:/example.org/{stem}", "page:http://example.org/{stem}"),
        ("s3:/bucket/videos", "s3://bucket/videos"),
        ("az:/box/videos", "az://box/videos"),
        ({"archives": "url:https:/me:secret@example.org/a.zip"}, "url:https://example.org/a.zip"),
        ({"archives": "s3:/bucket/a.zip"}, "s3://bucket/a.zip"),
    ],
)
def test_an_address_that_lost_a_slash_is_told_with_both(location, meant):
    with pytest.raises(ValueError, match="a slash is missing") as error:
        open_source(location, QUICK)
    assert str(error.value).endswith(f"; write {meant}")


def test_a_bare_web_address_is_told_with_its_prefix():
    for location in ("https://me:secret@example.org/{path}", {"archives": "https://me:secret@example.org/a.zip"}):
        with pytest.raises(ValueError, match="write url: before it") as error:
            open_source(location, QUICK)
        assert "secret" not in str(error.value)
