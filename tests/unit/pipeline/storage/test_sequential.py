"""Long parts of a file over one request, from good and bad servers, and copies of whole shards."""

from __future__ import annotations

import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from framestream.pipeline import ShardsError
from framestream.pipeline.shards.index import Index
from framestream.pipeline.storage import ReadOptions, ReadOptionsError, ShardRef, open_storage
from tests.helpers.corpora.batches import batches
from tests.helpers.corpora.small_root import manifest
from tests.helpers.servers.web_server import turns

DATA = random.Random(1).randbytes(3_000_000)
FILE = ShardRef("file.tar", len(DATA), hashlib.sha256(DATA).hexdigest())
START, SIZE = 1000, len(DATA) - 5000
PART = DATA[START : START + SIZE]


def part_of(server, tmp_path, **over) -> bytes:
    storage = open_storage(server.url, ReadOptions(cache=str(tmp_path / "cache"), **over))
    return b"".join(storage.read_in_order(FILE, START, SIZE))


class Resigned:
    """Addresses below signed/ until the first request is made, and below again/ from then on."""

    def __init__(self, resolver) -> None:
        self.resolver, self.asked = resolver, 0

    def address(self, name: str):
        self.asked += 1
        return self.resolver.address(f"{'signed' if self.asked <= 2 else 'again'}/{name}")


def serve(request) -> None:
    request.serve(DATA)


def cut(request) -> None:
    """Send a third of what is asked for, then break the connection."""
    start, end = request.wanted(DATA)
    headers = {"Content_Range": f"bytes {start}-{end - 1}/{len(DATA)}", "ETag": request.etag}
    request.answer(206, DATA[start : start + (end - start) // 3], end - start, **headers)


def changed(request) -> None:
    """Send another version of the file."""
    start, end = request.wanted(DATA)
    headers = {"Content_Range": f"bytes {start}-{end - 1}/{len(DATA)}", "ETag": '"two"'}
    request.answer(206, DATA[start:end], **headers)


def drip(request) -> None:
    """Send a byte now and then."""
    start, end = request.wanted(DATA)
    request.send_response(206)
    request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(DATA)}")
    request.send_header("Content-Length", str(end - start))
    request.end_headers()
    for byte in DATA[start : start + 100]:
        request.wfile.write(bytes([byte]))
        request.wfile.flush()
        time.sleep(0.1)


def test_a_request_made_again_asks_for_the_address_again(server, tmp_path):
    """The first one was signed hours ago."""
    server.routes |= {"/signed/file.tar": turns(cut, lambda request: request.answer(403)), "/again/file.tar": serve}
    storage = open_storage(server.url, ReadOptions(cache=str(tmp_path / "cache")))
    storage._resolver = Resigned(storage._resolver)
    assert b"".join(storage.read_in_order(FILE, START, SIZE)) == PART
    assert [path for path, _ in server.asked] == ["/signed/file.tar", "/again/file.tar"]


def test_a_part_costs_one_request(server, tmp_path):
    server.routes["/file.tar"] = serve
    assert part_of(server, tmp_path) == PART
    assert server.ranges("/file.tar") == [f"bytes={START}-{START + SIZE - 1}"]


def test_a_folder_gives_the_same(tmp_path):
    (tmp_path / "file.tar").write_bytes(DATA)
    assert b"".join(open_storage(tmp_path).read_in_order(FILE, START, SIZE)) == PART


def test_a_broken_request_goes_on_where_it_broke(server, tmp_path):
    server.routes["/file.tar"] = turns(cut, lambda request: request.answer(503), lambda r: r.reset(), cut, cut, serve)
    assert part_of(server, tmp_path, retries=2) == PART
    starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in server.ranges("/file.tar")]
    assert starts == sorted(starts) and starts[-1] > SIZE // 2


@pytest.mark.parametrize(
    ("routes", "error", "message"),
    [
        ([cut, changed], ValueError, "has changed while it was being read"),
        ([lambda request: request.serve(DATA[:-1])], ValueError, "has 2,999,999 of 3,000,000 bytes"),
        ([lambda request: request.answer(404)], FileNotFoundError, "404"),
        ([lambda request: request.answer(body=DATA)], ValueError, "cannot send parts of a file"),
        ([lambda request: request.answer(500)], ConnectionError, r"500 .*\(3 tries\)"),
        ([drip], TimeoutError, "loader.read_timeout"),
    ],
)
def test_a_bad_server_is_named_in_one_line(server, tmp_path, routes, error, message):
    server.routes["/file.tar"] = turns(*routes)
    with pytest.raises(error, match=message) as caught:
        part_of(server, tmp_path, retries=2, timeout=1.0)
    assert str(caught.value).startswith(f"{server.url}/file.tar: ") and "\n" not in str(caught.value)


# Copies -------------------------------------------------------------------------------------------------------------


def copying(where, tmp_path, gigabytes: float = 0.01):
    return open_storage(where, ReadOptions(cache=str(tmp_path / "cache"), cache_gb=gigabytes, access="sequential"))


RANGES = [(5, 18_000), (100_000, 20_000), (2_500_000, 50_000), (120_000, 1)]
EXPECTED = [DATA[offset : offset + size] for offset, size in RANGES]


def test_a_shard_is_copied_once_for_all_who_read_it(server, tmp_path):
    server.routes["/file.tar"] = serve
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda _: copying(server.url, tmp_path).read(FILE, RANGES), range(16)))
    assert read == [EXPECTED] * 16 and len(server.asked) == 1


def test_batches_are_those_of_ranges_with_a_request_a_shard(served, root, tmp_path):
    settings = {"loader__cache": str(tmp_path / "cache"), "loader__cache_gb": 0.1, "loader__access": "sequential"}
    assert batches(manifest(root, shards=served.url, **settings)) == batches(manifest(root))
    asked = [path for path, _ in served.asked if path.endswith(".tar")]
    assert asked and len(asked) == len(set(asked))


def test_copies_stay_within_the_limit(server, tmp_path):
    files = {name: random.Random(name).randbytes(400_000) for name in "abcd"}
    for name, data in files.items():
        server.routes[f"/{name}"] = lambda request, data=data: request.serve(data)
    storage = copying(server.url, tmp_path, 0.001)
    for name, data in [*files.items(), *reversed(files.items())]:
        shard = ShardRef(name, len(data), hashlib.sha256(data).hexdigest())
        assert storage.read(shard, [(10, 1000)]) == [data[10:1010]]
        kept = [path.stat().st_size for path in (tmp_path / "cache" / "shards").iterdir() if path.name != "lock"]
        assert sum(kept) <= 1_000_000
    assert len(server.asked) == 6, "the two that were read last are not copied again"


def test_a_damaged_copy_is_never_used(server, tmp_path):
    bad = bytearray(DATA)
    bad[1_000_000] ^= 1
    server.routes["/file.tar"] = turns(lambda request: request.serve(bytes(bad)), serve)
    with pytest.raises(ValueError, match=r"file\.tar: damaged"):
        copying(server.url, tmp_path).read(FILE, RANGES)
    assert copying(server.url, tmp_path).read(FILE, RANGES) == EXPECTED


def test_a_shard_above_the_limit_is_refused(server, tmp_path):
    with pytest.raises(ReadOptionsError, match="has 3,000,000 bytes; loader.cache_gb: 0.001 has room for 1,000,000"):
        copying(server.url, tmp_path, 0.001).read(FILE, RANGES)


@pytest.mark.parametrize(
    ("folder", "gigabytes", "message"),
    [
        ("", 0.0, "loader.access: sequential needs room for copies; set loader.cache_gb"),
        ("", 1e-6, "{root}: a shard has .* bytes; loader.cache_gb: 1e-06 has room for 1,000; raise it"),
        ("build.json", 1.0, "loader.cache: {root}/build.json/shards: cannot be written .*; name another folder"),
        ("/proc/nope", 1.0, "loader.cache: /proc/nope/shards: cannot be written .*; name another folder"),
    ],
)
def test_copies_that_cannot_be_made_are_said_at_the_start(root, tmp_path, folder, gigabytes, message):
    stage = root / "stage2"
    cache = stage / folder if folder else tmp_path
    with pytest.raises(ShardsError, match=f"^{message.format(root=stage)}"):
        Index.open(stage, ReadOptions(cache=str(cache), cache_gb=gigabytes, access="sequential"))


def test_the_part_that_a_killed_process_left_is_removed(server, tmp_path):
    server.routes["/file.tar"] = serve
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    (folder / f"{'0' * 64}.tmp").write_bytes(bytes(8_000_000))
    assert copying(server.url, tmp_path).read(FILE, RANGES) == EXPECTED
    assert sorted(path.name for path in folder.iterdir()) == [FILE.digest, "lock"]
