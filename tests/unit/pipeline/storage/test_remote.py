"""Roots read from a web server, good or bad, against the same root read from its folder."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import ssl
import threading
import time
import zlib
from collections import Counter

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from framestream.pipeline import ManifestError, ShardsError, build_loader
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mux_mjpeg
from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import Index
from framestream.pipeline.storage import ReadOptions, connections, open_storage
from tests.helpers.corpora.batches import batches
from tests.helpers.corpora.small_root import Root, manifest
from tests.helpers.servers.web_server import Server, turns
from tests.unit.pipeline.storage.conftest import DATA, EXPECTED, FILE, RANGES, REFUSALS, drip, drip_head, serve_folder


def reads(server, tmp_path, **over):
    """The storage of a server, and what it gives for RANGES."""
    storage = open_storage(server.url, ReadOptions(cache=str(tmp_path / "cache"), **over))
    return [bytes(part) for part in storage.read(FILE, RANGES)]


# The same as from a folder ----------------------------------------------------------------------------------------


def test_batches_equal_those_of_a_folder(served, root, tmp_path):
    expected = batches(manifest(root))
    remote = manifest(root, shards=served.url, loader__cache=str(tmp_path / "cache"))
    assert batches(remote) == expected and len(expected) > 3
    served.asked.clear()
    assert batches(remote) == expected
    files = Counter(path for path, _ in served.asked)
    assert files.pop("/stage2/build.json") == 1
    assert files and all(path.endswith(".tar") for path in files), "the index or its tokens are not kept"
    assert all("range" in headers for _, headers in served.asked)


def test_a_node_reads_ranges_once_where_they_are_cached(served, root, tmp_path):
    remote = manifest(root, shards=served.url, loader__cache=str(tmp_path / "cache"), loader__cache_gb=0.01)
    first = batches(remote)
    served.asked.clear()
    assert batches(remote) == first
    assert [path for path, _ in served.asked] == ["/stage2/build.json"]


def test_eight_of_512_frames_cost_a_twentieth_of_the_sample(server, tmp_path):
    made, rng = Root(tmp_path, size=96), np.random.default_rng(0)
    jpegs = [encode_jpeg(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8), 90, "420") for _ in range(512)]
    seconds = np.arange(512) / 2.0
    row = made._add("video", mux_mjpeg(jpegs, seconds, 256.0, 96, 96), 96, 96, np.arange(512), 512, 2.0)
    made.write()
    serve_folder(server, tmp_path)
    index = Index.open(f"{server.url}/stage2", ReadOptions(cache=str(tmp_path / "cache")))
    server.asked.clear()
    places, out = np.linspace(0, 511, 8).astype(int).tolist(), np.empty((2, 8, 96, 96, 3), dtype=np.uint8)
    FrameReader(index).read_frames(row, places, out[0])
    asked = [headers["range"].removeprefix("bytes=").split("-") for _, headers in server.asked]
    size = index.media["size"][row].as_py()
    assert size > 512 * 5000
    assert 0 < sum(int(last) + 1 - int(first) for first, last in asked) <= 0.05 * size
    FrameReader(Index.open(tmp_path / "stage2")).read_frames(row, places, out[1])
    assert np.array_equal(*out)


def test_a_forked_process_reads_after_its_parent_has(server, tmp_path):
    server.routes["/file.tar"] = lambda request: request.serve(DATA)
    storage = open_storage(server.url, ReadOptions(cache=str(tmp_path / "cache")))
    assert [bytes(part) for part in storage.read(FILE, RANGES)] == EXPECTED

    def child():
        assert [bytes(part) for part in storage.read(FILE, RANGES)] == EXPECTED

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0


# Bad servers ------------------------------------------------------------------------------------------------------


def fails_at_first(data: bytes, asked: Counter, failed: list):
    """A route that fails the first try of a fifth of all ranges, in every way that may pass."""
    kinds = [
        lambda request: request.answer(503, b"busy", Retry_After="0"),
        lambda request: request.answer(500),
        lambda request: request.reset(),
        lambda request: request.answer(206, b"", 1000, Content_Range=f"bytes 0-999/{len(data)}"),  # less than it says
        lambda request: request.answer(206, b"x" * 10, Content_Range=f"bytes 1-10/{len(data)}"),  # another part
    ]

    def route(request):
        key = f"{request.path} {request.headers['Range']}"
        asked[key] += 1
        drawn = zlib.crc32(key.encode())
        if asked[key] == 1 and drawn % 5 == 0:
            failed.append(key)
            return kinds[len(failed) % len(kinds)](request)
        request.serve(data)

    return route


def test_a_fifth_of_requests_failing_changes_no_batch(server, root, tmp_path, monkeypatch):
    monkeypatch.setattr("framestream.pipeline.storage.coalesce.GAP", -1)  # each frame is a request
    asked, failed = Counter(), []
    for path in (root / "stage2").rglob("*"):
        if path.is_file() and not path.name.startswith("tokens-"):
            name = f"/{path.relative_to(root).as_posix()}"
            server.routes[name] = fails_at_first(path.read_bytes(), asked, failed)
    remote = manifest(root, shards=server.url, loader__cache=str(tmp_path / "cache"))
    assert batches(remote) == batches(manifest(root))
    assert 0.1 * len(asked) <= len(failed) <= 0.3 * len(asked) and len(failed) > 10


def test_a_connection_closed_while_idle_costs_no_try(server, tmp_path):
    def hangs_up(request):
        request.serve(DATA)
        request.close_connection = True  # without saying so

    server.routes["/file.tar"] = hangs_up
    for _ in range(3):
        assert reads(server, tmp_path, retries=0) == EXPECTED


@pytest.mark.parametrize("behave, error, text", REFUSALS)
def test_what_does_not_pass_is_one_line_that_names_the_file(server, tmp_path, behave, error, text):
    server.routes["/file.tar"] = behave
    with pytest.raises(error, match=text) as raised:
        reads(server, tmp_path, retries=2, timeout=5)
    assert str(raised.value).startswith(f"{server.url}/file.tar: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("behave", [lambda request: request.stall(), drip, drip_head])
def test_a_read_ends_in_time_and_the_next_one_is_not_disturbed(server, tmp_path, behave):
    server.routes["/file.tar"] = behave
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="/file.tar: .*loader.read_timeout"):
        reads(server, tmp_path, timeout=1)
    assert time.monotonic() - begun < 30
    server.routes["/file.tar"] = lambda request: request.serve(DATA)
    assert reads(server, tmp_path) == EXPECTED


def test_one_silent_try_is_followed_by_another(server, tmp_path):
    server.routes["/file.tar"] = turns(lambda request: request.stall(), lambda request: request.serve(DATA))
    assert reads(server, tmp_path, timeout=2) == EXPECTED


def test_many_threads_read_at_once(server, tmp_path):
    server.routes["/file.tar"] = lambda request: request.serve(DATA)
    storage, wrong = open_storage(server.url, ReadOptions(cache=str(tmp_path / "cache"))), []

    def work():
        for _ in range(10):
            if [bytes(part) for part in storage.read(FILE, RANGES)] != EXPECTED:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Logins, redirects, proxies ---------------------------------------------------------------------------------------


def test_a_login_goes_to_its_server_and_into_no_message(server, tmp_path):
    with Server() as other:
        other.routes["/elsewhere"] = turns(
            *[lambda request: request.serve(DATA)] * 4, lambda request: request.answer(404)
        )
        server.routes["/file.tar"] = lambda request: request.answer(302, Location=f"{other.url}/elsewhere?signature=s")
        address = server.url.replace("//", "//me:s%3Acret@")
        storage = open_storage(address, ReadOptions(cache=str(tmp_path / "cache")))
        assert [bytes(part) for part in storage.read(FILE, RANGES)] == EXPECTED
        first = len(server.asked)
        assert {headers["authorization"] for _, headers in server.asked} == {"Basic bWU6czpjcmV0"}
        assert not any("authorization" in headers for _, headers in other.asked)
        with pytest.raises(FileNotFoundError) as raised:  # the place it redirected to is no longer good: asked again
            storage.read(FILE, RANGES)
        assert len(server.asked) > first
        with pytest.raises(ShardsError) as refused:
            Index.open(f"{address}/nothing")
        for text in (str(raised.value), str(refused.value), str(storage.root), str(storage.derived_folders)):
            assert "cret" not in text and "signature" not in text


def test_a_redirect_is_followed_once_for_many_reads(server, tmp_path):
    server.routes["/file.tar"] = lambda request: request.answer(302, Location="/moved")
    server.routes["/moved"] = lambda request: request.serve(DATA)
    for _ in range(3):
        assert reads(server, tmp_path) == EXPECTED
    assert len(server.ranges("/file.tar")) <= len(RANGES) < len(server.ranges("/moved"))


def test_the_proxy_of_the_environment_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:secret@"))
    server.routes["http://shards.example/stage2/file.tar"] = lambda request: request.serve(DATA)
    storage = open_storage("http://shards.example/stage2", ReadOptions(cache=str(tmp_path / "cache")))
    for _ in range(2):
        assert [bytes(part) for part in storage.read(FILE, RANGES)] == EXPECTED
    headers = server.asked[0][1]
    assert headers["host"] == "shards.example" and headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"


def certificate(folder):
    """A key with a certificate for localhost, in one file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "me")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *plain)
        + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_https_reads_from_servers_with_a_good_certificate_alone(server, tmp_path, monkeypatch):
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    server.routes["/file.tar"] = lambda request: request.serve(DATA)
    address = server.url.replace("http://127.0.0.1", "https://localhost")
    storage = open_storage(address, ReadOptions(cache=str(tmp_path / "cache")))
    monkeypatch.setattr(connections, "_tls", connections._tls.__wrapped__)  # as the environment is, every time
    with pytest.raises(ConnectionError, match="the server's certificate is not valid"):
        storage.read(FILE, RANGES)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    for _ in range(2):  # over new connections, and over these
        assert [bytes(part) for part in storage.read(FILE, RANGES)] == EXPECTED
    server.routes["/file.tar"] = lambda request: request.answer(302, Location=server.url)
    with pytest.raises(ConnectionError, match="redirects from https: to http:"):
        storage.read(FILE, RANGES)


# The index --------------------------------------------------------------------------------------------------------


def test_another_build_at_the_address_is_read_anew(server, tmp_path):
    reading = ReadOptions(cache=str(tmp_path / "cache"), cache_gb=0.01)
    found = []
    for vlen in (5, 9):
        made = Root(tmp_path / str(vlen))
        made.dialogue([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}], [made.video(vlen, vlen)])
        made.write()
        serve_folder(server, tmp_path / str(vlen))
        index = Index.open(f"{server.url}/stage2", reading)
        out = np.empty((vlen, 64, 64, 3), dtype=np.uint8)
        FrameReader(index).read_frames(0, list(range(vlen)), out)
        expected = np.empty_like(out)
        FrameReader(Index.open(tmp_path / str(vlen) / "stage2")).read_frames(0, list(range(vlen)), expected)
        assert np.array_equal(out, expected)
        found.append(index.fingerprint)
        assert [path.name for path in index.storage.derived_folders[0].iterdir() if path.is_dir()] == [
            index.fingerprint
        ]
    assert found[0] != found[1]


def test_an_unfinished_or_mixed_copy_is_not_used(served, root, tmp_path):
    reading, address = ReadOptions(cache=str(tmp_path / "cache")), f"{served.url}/stage2"
    good = served.routes["/stage2/index/media.arrow"]
    served.routes["/stage2/index/media.arrow"] = served.routes["/stage2/index/shards.arrow"]
    with pytest.raises(ShardsError, match="files are not those of build.json; copy the finished root there again"):
        Index.open(address, reading)
    left = (
        open_storage(address, reading).derived_folders[0]
        / f"{json.loads((root / 'stage2' / 'build.json').read_text())['index_fingerprint']}.tmp"
    )
    assert left.is_dir()
    (left / "index" / "media.arrow").write_bytes(b"torn")
    served.routes["/stage2/index/media.arrow"] = good
    assert len(Index.open(address, reading).media) == len(Index.open(root / "stage2").media)
    assert not left.exists()


def test_large_files_are_copied_in_pieces_of_one_file(served, root, tmp_path, monkeypatch):
    monkeypatch.setattr("framestream.pipeline.storage.remote.PIECE", 700)
    name, reading = "/stage2/index/media.arrow", ReadOptions(cache=str(tmp_path / "cache"))
    data, good = (root / "stage2" / "index" / "media.arrow").read_bytes(), served.routes[name]
    served.routes[name] = turns(good, lambda request: request.serve(data, ETag='"another"'))
    with pytest.raises(ShardsError, match="media.arrow: has changed while it was being read"):
        Index.open(f"{served.url}/stage2", reading)
    served.routes[name], served.asked[:] = good, []
    Index.open(f"{served.url}/stage2", reading)  # compared with the fingerprint
    assert len(served.ranges(name)) == -(-len(data) // 700) > 8


@pytest.mark.parametrize("build", [b"{", b"[]", b"{}", b'{"index_fingerprint": "../../etc"}'])
def test_a_build_json_that_is_none_is_one_line(server, tmp_path, build):
    server.routes["/build.json"] = lambda request: request.serve(build)
    with pytest.raises(ShardsError, match=f"^{server.url}[:/].*copy the finished root there again$") as raised:
        Index.open(server.url, ReadOptions(cache=str(tmp_path / "cache")))
    assert "\n" not in str(raised.value)


def test_nothing_there_and_no_such_kind_of_address(server, tmp_path):
    reading = ReadOptions(cache=str(tmp_path / "cache"))
    with pytest.raises(ShardsError, match="build.json: the server answered 404 Not Found.*no finished shards"):
        Index.open(f"{server.url}/stage2", reading)
    for address in ("ftp://host/a", "https:///a", "https://host/a?b=c", "s3://", "hf://me/data"):
        with pytest.raises(ShardsError, match="not .*https://HOST/PATH|not s3://|not hf://"):
            Index.open(address, reading)


def test_a_cache_folder_that_cannot_be_written_is_named(served, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardsError, match="loader.cache: .*file/cache cannot be written"):
        Index.open(f"{served.url}/stage2", ReadOptions(cache=str(tmp_path / "file" / "cache")))


def test_a_shard_that_is_not_there_costs_its_dialogues_alone(served, root, tmp_path):
    del served.routes["/stage2/image/train-000001.tar"]
    remote = manifest(root, shards=served.url, loader__cache=str(tmp_path / "cache"), loader__max_unreadable=100)
    skipped = [reason for batch in build_loader(remote) for _, reason in batch.skipped]
    assert skipped and all("image/train-000001.tar" in reason and "404" in reason for reason in skipped)


def test_shards_are_not_built_at_an_address(root):
    made = manifest(root, shards="https://host/shards/")
    assert made.shard_address == "https://host/shards/stage2"
    with pytest.raises(ManifestError, match="shards: https://host/shards/ is an address"):
        _ = made.shard_root
