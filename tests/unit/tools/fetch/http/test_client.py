"""Downloads from servers that stall, break, lie, ask to wait or redirect end with the file or the right reason."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import random
import threading
import time

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.http.client import ExpectedFile, HttpClient, redact_url
from framestream.tools.fetch.http.retry import FetchLimits
from tests.helpers.servers.web_server import QUICK, Server, turns

DATA = random.Random(0).randbytes(300_000)
HALF = len(DATA) // 2


def good(request):
    request.serve(DATA)


def fetch(server, tmp_path, expected=None, limits=QUICK, path="/file", **client):
    target = tmp_path / "file"
    HttpClient(limits, **client).download(server.url + path, target, "the file", expected)
    return target.read_bytes()


def failure(server, tmp_path, *arguments, **named):
    with pytest.raises(FetchError) as error:
        fetch(server, tmp_path, *arguments, **named)
    assert str(error.value).startswith("the file: ") and "\n" not in str(error.value)
    assert "127.0.0.1" not in str(error.value), "an address can hold a password"
    return error.value.reason


def breaks(at, how="reset", etag=True):
    """Return a route that sends the requested rest of the file and breaks after byte ``at``."""

    def route(request):
        start = (request.wanted(DATA) or (0, 0))[0]
        headers = {"ETag": request.etag} if etag else {}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        request.answer(206 if start else 200, DATA[start:at], length=len(DATA) - start, **headers)
        getattr(request, how)() if how else None

    return route


# Good servers ---------------------------------------------------------------------------------------------------------


def test_files_end_by_length_by_chunks_or_with_the_connection(server, tmp_path):
    def chunks(request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for start in range(0, len(DATA), 50_000):
            part = DATA[start : start + 50_000]
            request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        request.wfile.write(b"0\r\n\r\n")

    def until_closed(request):
        request.send_response(200)
        request.end_headers()
        request.wfile.write(DATA)
        request.close_connection = True

    for route in (good, chunks, until_closed):
        server.routes["/file"] = route
        assert fetch(server, tmp_path) == DATA
    assert all(headers["accept-encoding"] == "identity" for _, headers in server.asked)


def test_an_empty_file_is_a_file(server, tmp_path):
    server.routes["/file"] = lambda request: request.serve(b"")
    assert fetch(server, tmp_path) == b""
    assert HttpClient(QUICK).probe(server.url + "/file", "x").size == 0


@pytest.mark.parametrize("status", [403, 408, 429, 500, 502, 503, 504])
def test_busy_servers_are_asked_again(server, tmp_path, status):
    server.routes["/file"] = turns(*[lambda request: request.answer(status)] * 2, good)
    assert fetch(server, tmp_path) == DATA
    assert len(server.asked) == 3


def record_waits(monkeypatch) -> list[float]:
    """Return the seconds that this thread asks to sleep, which it does not. Other threads sleep as before."""
    waits, sleep = [], time.sleep
    here = threading.current_thread()
    monkeypatch.setattr(time, "sleep", lambda s: waits.append(s) if threading.current_thread() is here else sleep(s))
    return waits


def test_retry_after_is_waited_for_and_bounded(server, tmp_path, monkeypatch):
    waits = record_waits(monkeypatch)
    asks = [{"Retry_After": "7"}, {"Retry_After": "9999999"}, {"RateLimit": '"resolvers";r=0;t=11'}]
    dated = {"Retry_After": "Wed, 21 Oct 2015 07:28:00 GMT"}  # long past
    routes = [lambda request, ask=ask: request.answer(429, **ask) for ask in (*asks, dated)]
    server.routes["/file"] = turns(*routes, good)
    limits = dataclasses.replace(QUICK, seconds=10_000, retries=4)
    assert fetch(server, tmp_path, limits=limits) == DATA
    assert [int(wait) for wait in waits] == [7, 300, 11, 0]


def test_waits_grow_and_are_drawn_at_random(server, tmp_path, monkeypatch):
    waits, bounds = record_waits(monkeypatch), []
    monkeypatch.setattr(random, "uniform", lambda low, high: bounds.append((low, high)) or high)
    server.routes["/file"] = lambda request: request.answer(503)
    limits = FetchLimits(seconds=1000, retries=8, backoff=1)
    assert failure(server, tmp_path, limits=limits) == "unreachable"
    assert bounds[:8] == [(0, high) for high in (2, 4, 8, 16, 32, 60, 60, 60)] and waits == [
        high for _, high in bounds[:8]
    ]


def test_no_wait_goes_past_the_time_limit(server, tmp_path):
    server.routes["/file"] = lambda request: request.answer(503, Retry_After="60")
    assert failure(server, tmp_path) == "unreachable"
    assert len(server.asked) == 1


# Broken connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reset", "stall", ""])
def test_a_broken_download_goes_on_where_it_broke(server, tmp_path, how):
    server.routes["/file"] = turns(breaks(100_000, how), breaks(200_000, how), good)
    assert fetch(server, tmp_path, ExpectedFile(len(DATA), {"sha256": hashlib.sha256(DATA).hexdigest()})) == DATA
    first, *more = [int((asked or "bytes=0-")[6:-1]) for asked in server.ranges("/file")]
    assert first == 0 and more == sorted(more) and more[-1] > HALF // 2
    assert all(headers["if-range"] == '"one"' for _, headers in server.asked[1:])


def test_any_number_of_breaks_is_survived_while_more_arrives(server, tmp_path):
    steps = [breaks(at) for at in range(30_000, 300_000, 30_000)]
    server.routes["/file"] = turns(*steps, good)
    assert fetch(server, tmp_path, limits=dataclasses.replace(QUICK, retries=1)) == DATA
    assert len(server.asked) == len(steps) + 1


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.routes["/file"] = turns(breaks(200_000), lambda request: request.answer(body=DATA, ETag='"one"'))
    assert fetch(server, tmp_path) == DATA


def test_a_file_that_changed_starts_over(server, tmp_path):
    def changed(request):
        request.etag = '"two"'
        request.serve(DATA[::-1])

    server.routes["/file"] = turns(breaks(200_000), changed)
    assert fetch(server, tmp_path) == DATA[::-1]


def test_a_server_that_ignores_if_range_is_seen_through(server, tmp_path):
    def changed(request):
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        span = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        request.answer(
            206 if start else 200, DATA[::-1][start:], ETag='"two"', **{"Content-Range": span} if start else {}
        )

    server.routes["/file"] = turns(breaks(200_000), changed)
    assert fetch(server, tmp_path) == DATA[::-1]


def test_without_etag_and_date_a_download_starts_over(server, tmp_path):
    server.routes["/file"] = turns(breaks(200_000, etag=False), good)
    assert fetch(server, tmp_path) == DATA
    assert server.ranges("/file") == [None, None]


@settings(max_examples=20)
@given(
    cuts=st.lists(st.tuples(st.integers(1, len(DATA) - 1), st.sampled_from(["reset", "", "503", "416"])), max_size=4)
)
def test_whatever_breaks_where_the_bytes_are_right(tmp_path_factory, cuts):
    statuses = {"503": 503, "416": 416}
    routes = [
        (lambda request, status=statuses[how]: request.answer(status)) if how in statuses else breaks(at, how)
        for at, how in cuts
    ]
    with Server() as server:
        server.routes["/file"] = turns(*routes, good)
        limits = dataclasses.replace(QUICK, retries=4, backoff=0.001)
        assert fetch(server, tmp_path_factory.mktemp("x"), limits=limits) == DATA


def test_a_server_that_says_nothing_is_given_up(server, tmp_path):
    server.routes["/file"] = lambda request: request.stall()
    limits = dataclasses.replace(QUICK, retries=1, stall=0.2)
    assert failure(server, tmp_path, limits=limits) == "unreachable"
    assert len(server.asked) == 2


def test_nobody_listens(tmp_path):
    with Server() as server:
        pass
    assert failure(server, tmp_path) == "unreachable"


# Limits ---------------------------------------------------------------------------------------------------------------


def test_a_body_that_drips_ends_at_the_time_limit(server, tmp_path):
    def drips(request):
        request.answer(length=1000)
        for _ in range(200):
            request.wfile.write(b"x")
            request.wfile.flush()
            time.sleep(0.05)

    server.routes["/file"] = drips
    assert failure(server, tmp_path, limits=dataclasses.replace(QUICK, seconds=0.6)) == "timeout"


def test_a_stall_at_the_time_limit_is_a_timeout(server, tmp_path):
    server.routes["/file"] = lambda request: request.stall()
    assert failure(server, tmp_path, limits=dataclasses.replace(QUICK, seconds=0.3, stall=30)) == "timeout"


def test_too_large_by_its_length_is_not_read(server, tmp_path):
    server.routes["/file"] = lambda request: (request.answer(length=QUICK.bytes + 1), request.stall())
    assert failure(server, tmp_path) == "too_large"
    assert (tmp_path / "file").stat().st_size == 0


def test_an_endless_body_ends_at_the_size_limit(server, tmp_path):
    def endless(request):
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        while True:
            request.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    server.routes["/file"] = endless
    assert failure(server, tmp_path) == "too_large"
    assert (tmp_path / "file").stat().st_size <= QUICK.bytes + (1 << 17)


def test_compressed_bodies_are_refused_unless_the_file_is_compressed(server, tmp_path):
    server.routes["/file"] = lambda request: request.answer(body=b"bomb", Content_Encoding="gzip")
    server.routes["/file.json.gz"] = lambda request: request.answer(body=b"as it is", Content_Encoding="gzip")
    assert failure(server, tmp_path) == "unsupported"
    assert fetch(server, tmp_path, path="/file.json.gz") == b"as it is"


# Lies -----------------------------------------------------------------------------------------------------------------


def test_less_than_the_length_says(server, tmp_path):
    server.routes["/file"] = lambda request: request.answer(body=DATA, length=len(DATA) + 1)
    assert failure(server, tmp_path) == "bad_checksum"
    assert len(server.asked) == 1 + QUICK.retries


def test_bytes_beyond_the_length_are_cut_and_fail_the_checksum(server, tmp_path):
    server.routes["/file"] = lambda request: request.answer(body=DATA, length=HALF)
    assert fetch(server, tmp_path) == DATA[:HALF]
    assert failure(server, tmp_path, ExpectedFile(len(DATA))) == "bad_checksum"
    assert failure(server, tmp_path, ExpectedFile(digests={"md5": hashlib.md5(DATA).hexdigest()})) == "bad_checksum"


def digest_headers():
    def encoded(name):
        return base64.b64encode(hashlib.new(name, DATA).digest()).decode()

    yield {"Content_MD5": encoded("md5")}
    yield {"Digest": f"unixsum=1234,sha-256={encoded('sha256')},sha={encoded('sha1')}"}
    yield {"Repr_Digest": f"sha-512=:{encoded('sha512')}:, sha-256=:{encoded('sha256')}:"}
    yield {"x_goog_hash": f"crc32c=n03x6A==,md5={encoded('md5')}"}
    yield {"ETag": f'"{hashlib.md5(DATA).hexdigest()}"', "x_amz_request_id": "1"}


@pytest.mark.parametrize("headers", digest_headers(), ids=lambda headers: next(iter(headers)))
def test_checksums_of_servers_are_checked(server, tmp_path, headers):
    broken = DATA[:-1] + bytes([DATA[-1] ^ 1])
    server.routes["/file"] = lambda request: request.answer(body=DATA, **headers)
    assert fetch(server, tmp_path) == DATA
    server.routes["/file"] = lambda request: request.answer(body=broken, **headers)
    assert failure(server, tmp_path) == "bad_checksum"
    server.routes["/file"] = turns(lambda request: request.answer(body=broken, **headers), good)
    assert fetch(server, tmp_path) == DATA


def test_etags_that_are_no_checksums_are_none(server, tmp_path):
    etag = f'"{hashlib.md5(b"another").hexdigest()}"'
    for headers in ({}, {"x_amz_request_id": "1", "x_amz_server_side_encryption": "aws:kms"}):
        server.routes["/file"] = lambda request, headers=headers: request.answer(body=DATA, ETag=etag, **headers)
        assert fetch(server, tmp_path) == DATA


def test_a_git_blob_is_checked_by_its_name(server, tmp_path):
    """The id is what `git hash-object` prints."""
    server.routes["/file"] = lambda request: request.serve(b"hello\n")
    name = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert fetch(server, tmp_path, ExpectedFile(6, {"git": name})) == b"hello\n"
    assert failure(server, tmp_path, ExpectedFile(6, {"git": name[::-1]})) == "bad_checksum"


# Refusals and redirects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "asked"),
    [(404, "missing_file", 1), (410, "missing_file", 1), (401, "denied", 1), (451, "denied", 1), (403, "denied", 3),
     (400, "unreachable", 1), (503, "unreachable", 4)],
)  # fmt: skip
def test_refusals(server, tmp_path, status, reason, asked):
    server.routes["/file"] = lambda request: request.answer(status)
    assert failure(server, tmp_path) == reason
    assert len(server.asked) == asked


def redirect(target, status=302):
    return lambda request: request.answer(status, Location=target)


def test_redirects_are_followed(server, tmp_path):
    server.routes |= {"/file": redirect("/a b", 301), "/a%20b": redirect("c?d=e", 307), "/c": good}
    assert fetch(server, tmp_path) == DATA


def test_redirects_end(server, tmp_path):
    server.routes["/file"] = redirect("/file")
    assert failure(server, tmp_path) == "unreachable"
    assert len(server.asked) == 11


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "http://[::bad"])
def test_redirects_stay_within_http(server, tmp_path, target):
    server.routes["/file"] = redirect(target)
    assert failure(server, tmp_path) == "unreachable"
    assert len(server.asked) == 1 and not (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(("first", "then"), [("https", "http"), ("http", "https")])
def test_redirects_may_become_safer_only(tmp_path, first, then):
    """A response of a client whose network is a function."""
    asked = []

    def network(request):
        asked.append(request.url.scheme)
        status, headers = (302, {"location": f"{then}://h/x"}) if len(asked) == 1 else (200, {})
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(b""))

    http = HttpClient(QUICK)
    http._client = httpx2.Client(transport=httpx2.MockTransport(network))
    if then == "https":
        http.download(f"{first}://h/x", tmp_path / "file", "x")
        assert asked == ["http", "https"]
    else:
        with pytest.raises(FetchError, match="from https: to http:"):
            http.download(f"{first}://h/x", tmp_path / "file", "x")
        assert asked == ["https"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "nothing"])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(FetchError) as error:
        HttpClient(QUICK).download(url, tmp_path / "file", "x")
    assert error.value.reason == "unreachable"


def test_a_login_goes_to_no_other_server(server, tmp_path):
    with Server() as other:
        other.routes |= {"/there": redirect("/here"), "/here": good}
        server.routes |= {"/file": redirect("/again"), "/again": redirect(f"{other.url}/there")}
        assert fetch(server, tmp_path, headers={"Authorization": "Bearer secret", "X-Kind": "a"}) == DATA
        assert [headers.get("authorization") for _, headers in server.asked] == ["Bearer secret"] * 2
        assert [headers.get("authorization") for _, headers in other.asked] == [None] * 2
        assert all(headers["x-kind"] == "a" for _, headers in other.asked)


def test_addresses_are_shown_without_credentials():
    assert (
        redact_url("https://me:pw@host:8/a/{path}?token=x&f={stem}#y") == "https://host:8/a/{path}?token=...&f={stem}"
    )


# Parts ----------------------------------------------------------------------------------------------------------------


def test_probe_tells_size_ranges_and_absence(server):
    server.routes |= {"/file": good, "/whole": lambda request: request.answer(body=DATA)}
    http = HttpClient(QUICK)
    found, whole = http.probe(server.url + "/file", "x"), http.probe(server.url + "/whole", "x")
    assert (found.size, found.ranges) == (len(DATA), True) and (whole.size, whole.ranges) == (len(DATA), False)
    assert http.probe(server.url + "/none", "x") is None
    server.routes["/none"] = lambda request: request.answer(401)
    with pytest.raises(FetchError, match="log in") as error:
        HttpClient(QUICK, login_hint="log in").probe(server.url + "/none", "x")
    assert error.value.reason == "denied"


def test_parts_and_their_failures(server):
    server.routes["/file"] = turns(lambda request: request.answer(503), breaks(5), good)
    http = HttpClient(QUICK)
    data, known = http.read(server.url + "/file", "x", 10, 20, None)
    assert data == DATA[10:30] and known.size == len(DATA)

    def part(start, end, span, etag='"one"'):
        return lambda request: request.answer(206, DATA[start:end], Content_Range=f"bytes {span}", ETag=etag)

    for route, reason in [
        (lambda request: request.answer(body=DATA), "unsupported"),
        (part(11, 31, "11-30/300000"), "bad_checksum"),
        (part(10, 12, "10-11/300000"), "bad_checksum"),
        (part(10, 30, "10-29/4"), "bad_checksum"),
        (part(10, 30, "10-29/300000", '"two"'), "bad_checksum"),
    ]:
        server.routes["/file"] = route
        with pytest.raises(FetchError) as error:
            http.read(server.url + "/file", "x", 10, 20, known)
        assert error.value.reason == reason


def test_parts_go_straight_to_where_they_were_found_until_that_fails(server):
    signed = itertools.count()
    server.routes |= {
        "/file": lambda request: request.answer(302, Location=f"/store?sign={next(signed)}"),
        "/store": good,
    }
    http = HttpClient(QUICK)
    for start in range(3):
        assert http.read(server.url + "/file", "x", start, 5, None)[0] == DATA[start : start + 5]
    assert len(server.ranges("/file")) == 1
    server.routes["/store"] = lambda request: good(request) if "sign=1" in request.path else request.answer(403)
    assert http.read(server.url + "/file", "x", 7, 5, None)[0] == DATA[7:12]
    assert len(server.ranges("/file")) == 2


def test_connections_are_kept(server):
    """Ranged reads of an archive would otherwise open a connection for every member."""
    ports = set()
    server.routes["/file"] = lambda request: (ports.add(request.client_address), request.serve(DATA))
    http = HttpClient(QUICK)
    assert http.probe(server.url + "/file", "x").size != UNKNOWN
    for start in range(5):
        http.read(server.url + "/file", "x", start, 1000, None)
    assert len(ports) == 1
