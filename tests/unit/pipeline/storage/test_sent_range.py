"""Ranges sent ahead over open connections: under way at once, as right as others, and each answered once."""

from __future__ import annotations

import multiprocessing
import threading
import time

import numpy as np
import pytest

from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import Index
from framestream.pipeline.storage import ReadOptions, open_storage, range_read, remote
from framestream.pipeline.storage.coalesce import RangeRequest, coalesce
from tests.helpers.corpora.batches import batches
from tests.helpers.corpora.small_root import manifest
from tests.helpers.servers.web_server import turns
from tests.unit.pipeline.storage.conftest import DATA, EXPECTED, FILE, RANGES, REFUSALS, drip, drip_head

REQUESTS = len(coalesce(RANGES))  #: two of them are one request


def serve(request):
    request.serve(DATA)


@pytest.fixture
def storage(server, tmp_path, monkeypatch):
    """A storage that has read once, so that its connections are open, and without early reads of other roots."""
    monkeypatch.setattr(remote._shared, "early", range_read.EarlyReads())
    server.routes["/file.tar"] = serve
    opened = open_storage(server.url, ReadOptions(cache=str(tmp_path / "cache"), timeout=2, retries=2))
    assert read(opened) == EXPECTED
    server.asked.clear()
    return opened


def read(storage):
    return [bytes(part) for part in storage.read(FILE, RANGES)]


def under_way(count, serve_then):
    """A route that answers no request before ``count`` have arrived."""
    gate = threading.Barrier(count, timeout=20)

    def route(request):
        gate.wait()
        serve_then(request)

    return route


# One round trip ---------------------------------------------------------------------------------------------------


def test_all_ranges_of_a_read_are_under_way_at_once(server, storage):
    server.routes["/file.tar"] = under_way(REQUESTS, serve)
    assert read(storage) == EXPECTED
    assert len(server.asked) == REQUESTS


def test_reads_ahead_are_under_way_while_nobody_waits(server, storage):
    """Those of two media, one of them in two dialogues, and of the reader itself, by one thread."""
    others = [[(offset + 20_000 * number, 1000) for offset in (0, 150_000)] for number in range(2)]
    others.append(others[0])
    server.routes["/file.tar"] = under_way(REQUESTS + 6, serve)
    assert all(storage.prefetch(FILE, ranges) for ranges in others)
    assert read(storage) == EXPECTED
    for ranges in others:
        assert [bytes(part) for part in storage.read(FILE, ranges)] == [DATA[at : at + size] for at, size in ranges]
    assert len(server.asked) == REQUESTS + 6, "a range is requested twice"


def test_one_decoding_thread_has_several_media_under_way(served, root, tmp_path):
    """Every request waits for three, so a loader that reads one medium after the other would wait for ever."""
    expected = batches(manifest(root))
    lock, waiting, most = threading.Lock(), set(), []

    def held(route):
        def serve_held(request):
            with lock:
                waiting.add(request)
                most.append(len(waiting))
            until = time.monotonic() + 0.3
            while max(most) < 3 and time.monotonic() < until:
                time.sleep(0.001)
            with lock:
                waiting.discard(request)
            route(request)

        return serve_held

    for name in [name for name in served.routes if name.endswith(".tar")]:
        served.routes[name] = held(served.routes[name])
    far = manifest(root, shards=served.url, loader__cache=str(tmp_path / "cache"), loader__threads=1)
    assert batches(far) == expected
    assert max(most) >= 3


# As right as others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behave, error, text", REFUSALS)
def test_refusals_over_open_connections_are_the_same(server, storage, behave, error, text):
    server.routes["/file.tar"] = behave
    with pytest.raises(error, match=text) as raised:
        read(storage)
    assert str(raised.value).startswith(f"{server.url}/file.tar: ") and "\n" not in str(raised.value)
    server.routes["/file.tar"] = serve
    assert read(storage) == EXPECTED


@pytest.mark.parametrize("behave", [lambda request: request.stall(), drip, drip_head])
def test_an_open_connection_that_drips_ends_in_time(server, storage, behave):
    storage._options = ReadOptions(cache=storage._options.cache, timeout=0.5)
    server.routes["/file.tar"] = behave
    with pytest.raises(TimeoutError, match="/file.tar: .*loader.read_timeout"):
        read(storage)
    server.routes["/file.tar"] = serve
    assert read(storage) == EXPECTED


def chunked(request):
    """The range in chunks, which only http.client reads here."""
    offset = request.wanted(DATA)[0]
    size = int(request.headers["Range"].rpartition("-")[2]) + 1 - offset
    request.send_response(206)
    request.send_header("Content-Range", f"bytes {offset}-{offset + size - 1}/{len(DATA)}")
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (size, DATA[offset : offset + size]))


@pytest.mark.parametrize(
    "behave",
    [
        chunked,
        lambda request: request.serve(DATA, Connection="close"),
        lambda request: request.serve(DATA, X_Long="x" * 10_000),
        lambda request: request.serve(DATA, Content_Encoding="identity"),
    ],
)
def test_unusual_answers_are_read_without_asking_again(server, storage, behave):
    server.routes["/file.tar"] = behave
    assert read(storage) == EXPECTED
    assert len(server.asked) == REQUESTS
    assert read(storage) == EXPECTED


@pytest.mark.parametrize(
    "behave",
    [
        serve,
        lambda request: request.serve(DATA, Connection="keep-alive"),
        lambda request: request.serve(DATA, CONTENT_type="video/mp4", X_Empty=""),
    ],
)
def test_usual_answers_need_no_other_client_and_keep_connections(server, storage, monkeypatch, behave):
    server.routes["/file.tar"] = behave
    monkeypatch.setattr("http.client.HTTPResponse.begin", None)  # the other client cannot read
    monkeypatch.setattr("framestream.pipeline.storage.connections._make_connection", None)
    for _ in range(3):
        assert storage.prefetch(FILE, RANGES[:1])
        assert bytes(storage.read(FILE, RANGES[:1])[0]) == EXPECTED[0]


def test_connections_that_the_server_closes_are_not_kept(server, storage):
    server.routes["/file.tar"] = lambda request: request.serve(DATA, Connection="close")
    place = "http", server.url.partition("//")[2]
    before = len(remote._shared.client.connections._idle[place])
    assert bytes(storage.read(FILE, RANGES[:1])[0]) == EXPECTED[0]
    assert len(remote._shared.client.connections._idle[place]) == before - 1


@pytest.mark.parametrize(
    "fault",
    [
        lambda request: request.answer(503, b"busy", Retry_After="0"),
        lambda request: request.reset(),
        lambda request: request.answer(206, b"x" * 10, Content_Range=f"bytes 1-10/{len(DATA)}"),
        lambda request: request.answer(206, DATA[6:18_006], Content_Range=f"bytes 6-18005/{len(DATA)}"),
        lambda request: request.answer(206, b"", 18_000, Content_Range=f"bytes 5-18004/{len(DATA)}"),
        lambda request: request.answer(206, DATA[5:20_000], Content_Range=f"bytes 5-18004/{len(DATA)}"),
        lambda request: request.wfile.write(b"HTTP/1.1 206 OK\r\nContent-Range bytes 5-18004/300000\r\n\r\n"),
        lambda request: request.wfile.write(b"\0" * 20_000),
    ],
)
def test_faults_that_pass_are_passed_over(server, storage, fault):
    first = []

    def route(request):
        if "bytes=5-" in request.headers["Range"] and not first:
            first.append(1)
            fault(request)
            request.close_connection = True
        else:
            request.serve(DATA)

    server.routes["/file.tar"] = route
    assert read(storage) == EXPECTED
    assert len(server.asked) == REQUESTS + 1


def test_the_wait_that_a_server_asks_for_is_kept(server, storage):
    server.routes["/file.tar"] = turns(lambda request: request.answer(503, Retry_After="60"), serve)
    with pytest.raises(ConnectionError, match="503 Service Unavailable .*loader.read_timeout"):
        read(storage)
    assert len(server.asked) <= REQUESTS, "asked again at once"


def test_connections_closed_while_idle_cost_no_try(server, storage):
    storage._options = ReadOptions(cache=storage._options.cache, retries=0)
    server.routes["/file.tar"] = lambda request: (request.serve(DATA), setattr(request, "close_connection", True))
    for _ in range(3):
        assert storage.prefetch(FILE, RANGES)
        assert read(storage) == EXPECTED


# Reads for which nobody comes -------------------------------------------------------------------------------------


def test_early_reads_are_bounded_and_old_ones_make_room(server, storage, monkeypatch):
    monkeypatch.setattr(range_read, "EARLY_REQUESTS", 5)
    before = remote._shared.sender._under_way
    nearby = [[(offset, 10)] for offset in range(0, 100, 10)]
    assert storage.prefetch(FILE, RANGES)  # one alone may be larger
    assert [storage.prefetch(FILE, ranges) for ranges in nearby[:3]] == [True, True, False]
    monkeypatch.setattr(range_read, "EARLY_SECONDS", 0.0)
    assert storage.prefetch(FILE, nearby[3])
    assert read(storage) == EXPECTED
    assert bytes(storage.read(FILE, nearby[3])[0]) == DATA[30:40]
    assert remote._shared.sender._under_way == before, "some are not answered or given up"


def test_a_failed_start_leaves_nothing_behind(storage):
    early = range_read.EarlyReads()

    def fails():
        raise OSError("no address")

    with pytest.raises(OSError, match="no address"):
        early.add("key", [RangeRequest(0, 1)], fails)
    assert early.take("key") is None and early.take("other") is None


def test_a_forked_process_shares_no_early_read(server, storage):
    storage._options = ReadOptions(cache=storage._options.cache, timeout=2, retries=0)
    assert storage.prefetch(FILE, RANGES)

    def child():
        assert read(storage) == EXPECTED

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert read(storage) == EXPECTED
    assert len(server.asked) == 2 * REQUESTS


def test_cached_ranges_are_not_requested_early(served, root, tmp_path):
    far = Index.open(f"{served.url}/stage2", ReadOptions(cache=str(tmp_path / "cache"), cache_gb=0.01))
    reader = FrameReader(far)
    row = far.media["kind"].to_pylist().index("video")
    out = np.empty((1, far.media["height"][row].as_py(), far.media["width"][row].as_py(), 3), dtype=np.uint8)
    served.asked.clear()
    assert reader.prefetch(row, [0])
    reader.read_frames(row, [0], out)
    assert len(served.asked) == 1
    assert reader.prefetch(row, [0]) and remote._shared.early.take((far.storage.root, "", ())) is None
    reader.read_frames(row, [0], out)
    assert len(served.asked) == 1
