"""Servers and archives that misbehave, in one build: each loses only its own items, with the right reason."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import yaml

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import RETRYABLE, read_ledger
from framestream.tools.verify_shards import main as verify
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.layouts import parts
from tests.helpers.corpora.media_corpus import TURNS
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.media.memory_files import pack, pack_tar, pack_zip, patched, tar_info
from tests.helpers.paths import BUILD_SHARDS
from tests.helpers.servers.web_server import Server, turns

SECONDS = 5  #: data.fetch_timeout; more than the waits before good answers, at most two of 2 seconds
HTML = b"<!DOCTYPE html><html><body>Sign in to see this video</body></html>"


def serves(data, **headers):
    return lambda request: request.serve(data, **headers)


def says(status, body=b"", **headers):
    return lambda request: request.answer(status, body, **headers)


def ignores_ranges(data):
    return lambda request: request.answer(body=data)


def sends_half(data, end):
    """Half of a file from where it is asked for, then ``end``."""

    def route(request):
        start, stop = request.wanted(data) or (0, len(data))
        if stop - start == 1:
            return request.serve(data)
        request.send_response(206 if start else 200)
        request.send_header("ETag", request.etag)
        request.send_header("Content-Length", str(stop - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        request.end_headers()
        request.wfile.write(data[start : (start + stop) // 2])
        getattr(request, end)()

    return route


def inside(request, data):
    """Whether a part behind the first and before the last 200 kB is asked for."""
    return 200_000 < (request.wanted(data) or (0, 0))[0] < len(data) - 200_000


def changes_inside(data):
    return lambda request: request.serve(data, ETag='"two"' if inside(request, data) else request.etag)


def stalls_inside(data):
    return lambda request: request.stall() if inside(request, data) else request.serve(data)


def without_length(data, chunks=1, pause=0.0):
    """A body that ends with the connection, sent ``chunks`` times."""

    def route(request):
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        for _ in range(chunks):
            request.wfile.write(data)
            if pause:
                request.wfile.flush()
                time.sleep(pause)
        request.close_connection = True

    return route


def garbage(request):
    request.wfile.write(b"\x00\x01 this is not HTTP\r\n" * 20)
    request.close_connection = True


def routes(video, server_url):
    """Of each web server's file: how it is served, and what becomes of it (empty: it is built)."""
    quit_early = sends_half(video, "reset")
    elsewhere = f"{server_url}/v/good.mp4"
    return {
        "good": (serves(video), ""),
        "busy": (turns(says(429, Retry_After="1"), serves(video)), ""),
        "overloaded": (turns(says(503, Retry_After="1"), says(500, Retry_After="1"), serves(video)), ""),
        "busy-403": (turns(says(403), serves(video)), ""),
        "resets-once": (turns(serves(video), quit_early, serves(video)), ""),
        "resets-often": (turns(serves(video), quit_early, quit_early, serves(video)), ""),
        "no-ranges": (ignores_ranges(video), ""),
        "no-ranges-resets": (turns(ignores_ranges(video), quit_early, ignores_ranges(video)), ""),
        "short-once": (turns(serves(video), lambda r: r.answer(body=video[:99], length=len(video)), serves(video)), ""),
        "no-length": (without_length(video), ""),
        "moved": (says(302, Location=elsewhere), ""),
        "always-busy": (says(429, Retry_After="3600"), "unreachable"),
        "broken": (says(500), "unreachable"),
        "resets": (lambda request: request.reset(), "unreachable"),
        "garbage": (garbage, "unreachable"),
        "in-circles": (lambda request: request.answer(302, Location=request.path), "unreachable"),
        "to-a-file": (says(302, Location="file:///etc/passwd"), "unreachable"),
        "teapot": (says(418), "unreachable"),
        "silent": (lambda request: request.stall(), "timeout"),
        "stalls": (sends_half(video, "stall"), "timeout"),
        "drips": (without_length(b"x", 100, pause=0.2), "timeout"),
        "lies-more": (lambda request: request.answer(body=video, length=len(video) + 1), "bad_checksum"),
        "lies-less": (lambda request: request.answer(body=video, length=len(video) // 2), "truncated"),
        "checksum": (serves(video, Content_MD5="1B2M2Y8AsgTpgAmY7PhCfg=="), "bad_checksum"),
        "forbidden": (says(403), "denied"),
        "login": (says(401), "denied"),
        "absent": (says(404, HTML), "missing_file"),
        "gone": (says(410), "missing_file"),
        "endless": (without_length(bytes(1 << 16), 1000), "too_large"),
        "large": (serves(bytes(3 << 20)), "too_large"),
        "large-by-name": (lambda request: request.answer(length=1 << 40), "too_large"),
        "packed": (says(200, b"x" * 100, Content_Encoding="gzip"), "unsupported"),
        "page": (says(200, HTML), "not_media"),
        "empty": (says(200), "empty_file"),
    }


def archives(video):
    """Of each root: its archives by name (None: not on the server), whether they are joined, and what becomes of the
    members that are asked for."""
    films = {f"{number}.mp4": video + bytes(number) for number in range(3)}
    whole = pack_zip([*films.items(), ("bomb.mp4", bytes(9 << 20)), ("locked.mp4", b"x"), ("odd.mp4", b"x")], 1)
    lying = patched(pack({"bomb.mp4": bytes(9 << 20), **films}, "deflate"), "bomb.mp4", "<L", 24, 1000)
    flipped = bytearray(pack(films, "stored"))
    flipped[flipped.index(b"moov")] ^= 1
    tar = [(tar_info("ok.mp4"), video), (tar_info("../../evil.mp4"), video), (tar_info("/abs.mp4"), video)]
    tar += [(tar_info("link.mp4", tarfile.SYMTYPE, "../../../../../../etc/hostname"), b"")]
    tar += [(tar_info("hard.mp4", tarfile.LNKTYPE, "../../etc/hostname"), b"")]
    tar += [(tar_info("absolute.mp4", tarfile.SYMTYPE, "/etc/hostname"), b"")]
    tar += [(tar_info("pipe.mp4", tarfile.FIFOTYPE), b""), (tar_info("inner.mp4", tarfile.SYMTYPE, "ok.mp4"), b"")]
    cut = pack({"first.mp4": video, "cut.mp4": bytes(1 << 19)}, "gnu")[: -(1 << 18)]
    stored = pack({**films, "padding": bytes(100_000)}, "stored")
    split = parts(stored, "part_{}.zip", 4)
    hole = {name: data for name, data in split.items() if name != "part_2.zip"}
    ok = dict.fromkeys(films, "")
    whole = patched(patched(whole, "locked.mp4", "<H", 8, 1), "odd.mp4", "<H", 10, 99)
    bad = {"bomb.mp4": "too_large", "locked.mp4": "unsupported", "odd.mp4": "unsupported", "no.mp4": "missing_file"}
    out = dict.fromkeys(("link.mp4", "hard.mp4", "absolute.mp4"), "outside_root")
    evil = {"evil.mp4": "missing_file", "../evil.mp4": "outside_root", "pipe.mp4": "unsupported"}
    return {
        "whole": ({"a.zip": whole}, False, {**ok, **bad}),
        "lying": ({"a.zip": lying}, False, {**ok, "bomb.mp4": "corrupt"}),
        "flipped": ({"a.zip": bytes(flipped)}, False, {"0.mp4": "bad_checksum", "1.mp4": "", "2.mp4": ""}),
        "traversal": ({"a.tar": pack_tar(tar)}, False, {"ok.mp4": "", "abs.mp4": "", "inner.mp4": "", **evil, **out}),
        "cut": ({"a.tar": cut}, False, {"first.mp4": "", "cut.mp4": "truncated"}),
        "truncated": ({"a.zip": whole[:-30]}, False, dict.fromkeys(films, "truncated")),
        "cut-gz": ({"a.tgz": pack(films, "tar.gz")[:-40]}, False, dict.fromkeys(films, "corrupt")),
        "split": (split, True, ok),
        "hole": (hole, True, dict.fromkeys(films, "truncated")),
        "no-end": ({name: split[name] for name in list(split)[:3]}, True, dict.fromkeys(films, "truncated")),
        "html": ({"a.zip": HTML}, False, {"0.mp4": "not_media"}),
        "other": ({"a.7z": b"7z\xbc\xaf\x27\x1c" + bytes(600)}, False, {"0.mp4": "unsupported"}),
        "nothing": ({"a.zip": b""}, False, {"0.mp4": "empty_file"}),
        "absent": ({"a.zip": None}, False, {"0.mp4": "unresolved"}),
    }


class Build:
    """A build over one entry for each root: the samples, what is expected of each, and the command."""

    def __init__(self, folder: Path, seconds: int = SECONDS) -> None:
        self.folder, self._seconds = folder, seconds
        self._entries, self._roots, self.expected = [], {}, {}
        for name in ("home", "notes", "temporary"):
            (folder / name).mkdir(parents=True)

    def add(self, name: str, place: object, expected: dict[str, str], split: str = "train") -> None:
        samples = [{"id": f"{name}/{path}", "video": path, "conversations": TURNS} for path in expected]
        file = corpus.annotations(self.folder / "notes" / f"{name}.json", samples)
        self._entries.append({"annotation": str(file), "root": f"https://example.org/{name}", "split": split})
        self._roots[f"https://example.org/{name}"] = place
        self.expected |= {f"{name}/{path}": reason for path, reason in expected.items()}

    def run(self, *options: str) -> subprocess.CompletedProcess:
        (self.folder / "roots.yaml").write_text(yaml.safe_dump(self._roots))
        fields = {"roots": str(self.folder / "roots.yaml"), "cache": str(self.folder / "cache"), "shard_mb": 1}
        fields |= {"fetch_mb": 1, "fetch_timeout": self._seconds, "entries": self._entries}
        sizes = {"sampler": "middle", "min": 4, "max": 4, "size": 64}
        tower = {"vision_tower": {"patch": 8}}
        manifest = corpus.manifest(self.folder / "m.yaml", [], data=fields, frames=sizes, model=tower)
        command = [sys.executable, str(BUILD_SHARDS), "--stage", "2", "--manifest", str(manifest), "--workers", "2"]
        command += ["--out", str(self.folder / "out"), *options]
        kept = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
        kept |= {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "temporary")}
        return subprocess.run(command, cwd=self.folder / "home", env=kept, capture_output=True, text=True)

    @property
    def root(self) -> Path:
        return self.folder / "out" / "stage2"

    def outcomes(self) -> dict[str, str]:
        """What became of each dialogue: the ledger's reason, empty if it was built."""
        rows = read_ledger(self.root).to_pylist()
        found = {row["dialogue"]: row["reason"] for row in rows if row["kind"] == "dialogue"}
        return found | dict.fromkeys(Index.open(self.root).dialogues["id"].to_pylist(), "")


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def build(server, tmp_path_factory):
    """A finished build over everything that can go wrong."""
    made = Build(tmp_path_factory.mktemp("bad"))
    video = corpus.video(made.folder / "notes" / "video.mp4", seconds=1).read_bytes()
    web = routes(video, server.url)
    server.routes |= {f"/v/{name}.mp4": route for name, (route, _) in web.items()}
    made.add("web", f"url:{server.url}/v/{{path}}", {f"{name}.mp4": reason for name, (_, reason) in web.items()})
    made.add("nobody", "url:http://127.0.0.1:9/{path}", {"0.mp4": "unreachable"}, "val")
    for name, (files, join, expected) in archives(video).items():
        for file, data in files.items():
            if data is not None:
                server.routes[f"/{name}/{file}"] = serves(data, ETag=f'"{hashlib.md5(data).hexdigest()}"')
        addresses = [f"url:{server.url}/{name}/{file}" for file in files]
        made.add(name, {"archives": addresses, "join": join}, expected, "val")
    films = pack({"before": bytes(300_000), "0.mp4": video, "behind": bytes(300_000)}, "stored")
    servers = {
        "archive-without-ranges": (ignores_ranges(films), "unresolved"),
        "archive-denied": (says(403), "unresolved"),
        "archive-breaks": (turns(serves(films), sends_half(films, "reset"), serves(films)), ""),
        "archive-changes": (changes_inside(films), "bad_checksum"),
        "archive-stalls": (stalls_inside(films), "timeout"),
    }
    for name, (route, reason) in servers.items():
        server.routes[f"/{name}.zip"] = route
        made.add(name, {"archives": f"url:{server.url}/{name}.zip"}, {"0.mp4": reason}, "val")
    made.before = snapshot(made.folder)
    made.ran = made.run("--skip-unresolved")
    return made


def test_each_costs_its_own_items_for_the_right_reason(build, capsys):
    assert build.ran.returncode in (0, 3), build.ran.stderr  # 3: nothing of an entry can be built
    assert build.outcomes() == build.expected
    assert "left out, with reasons" in build.ran.stdout and "unreachable" in build.ran.stdout
    assert verify([str(build.root), "--deep", "--workers", "1"]) == 0, capsys.readouterr().out


def test_what_was_built_is_the_video(build):
    """Whatever way a file came, the frames are those of the file."""
    rows = Index.open(build.root).media.select(["sha256", "vlen"]).to_pylist()
    assert len({row["sha256"] for row in rows}) == 1 and {row["vlen"] for row in rows} == {8}


def test_ledger_lines_are_clear(build):
    rows = [row for row in read_ledger(build.root).to_pylist() if row["kind"] == "media"]
    assert rows and all("\n" not in row["message"] and len(row["message"]) > 20 for row in rows)
    assert not [row for row in rows if "Traceback" in row["message"] or str(build.root) in row["message"]]
    assert "Traceback" not in build.ran.stderr


def test_nothing_is_written_outside_the_root_and_the_cache(build):
    after = snapshot(build.folder)
    mine = ("out/stage2/", "cache/archives/", "m.yaml", "roots.yaml")
    assert {name for name in after.keys() - build.before.keys() if not name.startswith(mine)} == set()
    assert {name: after[name] for name in build.before} == build.before
    assert not (build.root / "work").exists()


def test_what_may_have_passed_is_tried_again(build, server):
    """Afterwards, because it changes the root."""
    video = (build.folder / "notes" / "video.mp4").read_bytes()
    before = snapshot(build.root)
    for path in list(server.routes):
        if path.startswith("/v/"):
            server.routes[path] = serves(video)
        elif path.startswith("/archive-"):
            server.routes[path] = serves(pack({"0.mp4": video}, "stored"))
    ran = build.run("--retry-failed", "--skip-unresolved")
    assert ran.returncode in (0, 3), ran.stderr
    repaired = ("web/", "archive-")
    assert build.outcomes() == {
        name: "" if name.startswith(repaired) and reason in RETRYABLE else reason
        for name, reason in build.expected.items()
    }
    assert {name: data for name, data in before.items() if name.endswith(".tar")}.items() <= snapshot(
        build.root
    ).items()


def test_a_server_that_goes_down_in_the_middle(tmp_path):
    """What was not there by then is unreachable, or its time was over; it is there when the server is up again."""
    build, down = Build(tmp_path, seconds=2), threading.Event()
    video = corpus.video(tmp_path / "notes" / "video.mp4", seconds=1).read_bytes()
    with Server() as server:

        def route(request):
            if sum(headers.get("range") != "bytes=0-0" for _, headers in server.asked) > 4:
                down.set()
            request.reset() if down.is_set() else request.serve(video)

        names = [f"{number}.mp4" for number in range(12)]
        server.routes |= {f"/{name}": route for name in names}
        build.add("web", f"url:{server.url}/{{path}}", dict.fromkeys(names, ""))
        ran = build.run()
        assert ran.returncode in (0, 3), ran.stderr
        first = build.outcomes()
        assert {"", "unreachable"} <= set(first.values()) <= {"", "unreachable", "timeout"} and len(first) == 12
        server.routes |= {f"/{name}": serves(video) for name in names}
        ran = build.run("--retry-failed")
        assert ran.returncode == 0, ran.stderr
        assert build.outcomes() == build.expected
        record = json.loads((build.root / "build.json").read_bytes())
        assert record["entries"][0]["dialogues"] == 12 and record["entries"][0]["left_out"] == {}
