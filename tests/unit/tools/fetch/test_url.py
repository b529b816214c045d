"""URL templates: nothing in a media path changes the structure of a URL."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.url import UrlSource, UrlTemplate
from tests.helpers.servers.web_server import QUICK

part = st.text(min_size=1, max_size=9).filter(lambda text: "/" not in text and text not in (".", ".."))


@given(parts=st.lists(part, min_size=1, max_size=3))
def test_paths_are_quoted(parts):
    path = "/".join(parts)
    address = urlsplit(UrlTemplate("url", "https://host/x/{path}").url(path))
    assert address[:2] == ("https", "host") and not address.query and not address.fragment
    shown = path.encode("utf-8", "replace").decode()  # what has no bytes in UTF-8 becomes a question mark
    assert unquote(address.path) == f"/x/{shown}"
    address = urlsplit(UrlTemplate("url", "https://host/get?f={path}&key=1").url(path))
    assert address.path == "/get" and parse_qs(address.query, keep_blank_values=True) == {"f": [shown], "key": ["1"]}


@pytest.mark.parametrize(
    ("template", "path", "address"),
    [
        ("https://h/{folder}/x/{name}", "a/b/c.tar.gz", "https://h/a/b/x/c.tar.gz"),
        ("https://h/{stem}.webm", "a/b/c d.mp4", "https://h/c%20d.webm"),
        ("https://h/watch?v={stem}", "-x_1.mp4", "https://h/watch?v=-x_1"),
        ("http://me:pw@h:80/{path}", "{name}", "http://me:pw@h:80/%7Bname%7D"),
    ],
)
def test_placeholders(template, path, address):
    assert UrlTemplate("url", template).url(path) == address


@pytest.mark.parametrize(
    "template",
    ["https://h/x", "https://h/{file}", "https://{name}/x", "ftp://h/{path}", "file:///{path}", "https://h/{path}}",
     "https:///{path}", "https://h/{}", "{path}"],
)  # fmt: skip
def test_bad_templates(template):
    with pytest.raises(ValueError):
        UrlTemplate("url", template)


def test_files(server, tmp_path):
    server.routes["/v/a/b%20c.mp4"] = lambda request: request.serve(b"data")
    source = UrlSource(f"{server.url}/v/{{path}}", QUICK)
    assert source.find("a/b c.mp4") == 4 and source.find("a/d.mp4") is None
    assert source.fetch("a/b c.mp4", tmp_path) == tmp_path / "media.mp4"
    assert (tmp_path / "media.mp4").read_bytes() == b"data"
    before = source.identity("a/b c.mp4")
    server.routes["/v/a/b%20c.mp4"] = lambda request: request.serve(b"date", ETag='"two"')
    assert source.identity("a/b c.mp4") != before
    server.routes["/v/chunks"] = lambda request: request.answer(body=b"", length="x")
    for path in ("../x", "/x", "a/./b", ""):
        with pytest.raises(FetchError) as error:
            source.fetch(path, tmp_path)
        assert error.value.reason == "outside_root"
    with pytest.raises(FetchError) as error:
        source.find("frames", tree=True)
    assert error.value.reason == "unsupported"


def test_size_that_the_server_does_not_tell(server):
    def until_closed(request):
        request.send_response(200)
        request.end_headers()
        request.close_connection = True

    server.routes["/x"] = until_closed
    assert UrlSource(f"{server.url}/{{path}}", QUICK).find("x") == UNKNOWN


def test_error_lines_hold_no_credentials(server, tmp_path):
    address = server.url.replace("http://", "http://me:password@")
    source = UrlSource(f"{address}/get?file={{path}}&token=secret", QUICK)
    with pytest.raises(FetchError) as error:
        source.fetch("a.mp4", tmp_path)
    line = str(error.value) + source.origin
    assert "file=a.mp4" in line and "secret" not in line and "password" not in line
    assert server.asked[0][0] == "/get?file=a.mp4&token=secret"
    assert server.asked[0][1]["authorization"].startswith("Basic ")
