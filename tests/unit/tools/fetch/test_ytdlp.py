"""Video pages on the loopback interface, fetched by yt-dlp itself."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import framestream.tools.fetch.ytdlp
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.ytdlp import PageSource
from tests.helpers.servers.web_server import QUICK

VIDEO = random.Random(0).randbytes(200_000)
PAGE = b'<html><head><title>A clip</title></head><body><video src="/v/film.mp4"></video></body></html>'
SLOW = dataclasses.replace(QUICK, retries=1, stall=5)


def video(request):
    request.serve(VIDEO, Content_Type="video/mp4")


def page(request):
    request.answer(body=PAGE, Content_Type="text/html")


@pytest.fixture
def source(server):
    server.routes |= {"/watch": page, "/v/film.mp4": video}
    return PageSource(f"{server.url}/watch?v={{stem}}", SLOW)


def failure(source, tmp_path, path="x.mp4"):
    with pytest.raises(FetchError) as error:
        source.fetch(path, tmp_path)
    assert "\n" not in str(error.value)
    return error.value.reason


def test_the_video_of_a_page_whatever_the_settings_of_the_user(source, server, tmp_path, monkeypatch):
    (tmp_path / "home" / "yt-dlp").mkdir(parents=True)
    (tmp_path / "home" / "yt-dlp" / "config").write_text(f"--exec 'touch {tmp_path}/ran'\n-o {tmp_path}/elsewhere\n")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert source.find("a/-b c.mp4") == UNKNOWN and source.identity("x") == ""
    found = source.fetch("a/-b c.mp4", tmp_path / "scratch")
    assert found.read_bytes() == VIDEO and found.suffix == ".mp4"
    assert [item.name for item in (tmp_path / "scratch").iterdir()] == [found.name]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["home", "scratch"]
    assert server.asked[0][0] == "/watch?v=-b%20c"


def test_a_page_that_is_not_there_and_a_line_without_credentials(source, server, tmp_path):
    address = server.url.replace("http://", "http://me:password@")
    source = PageSource(f"{address}/{{stem}}?key=secret", SLOW)
    with pytest.raises(FetchError) as error:
        source.fetch("x", tmp_path)
    assert error.value.reason == "missing_file" and "404" in str(error.value)
    assert "secret" not in str(error.value) and "password" not in str(error.value)


def test_a_video_that_says_it_is_too_large(source, server, tmp_path):
    large = bytes(QUICK.bytes + 1)
    server.routes["/v/film.mp4"] = lambda request: request.serve(large, Content_Type="video/mp4")
    assert failure(source, tmp_path) == "too_large"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that replaces yt-dlp by a program and returns its scratch folder."""

    def make(program):
        (tmp_path / "fake").mkdir(exist_ok=True)
        (tmp_path / "fake" / "yt_dlp.py").write_text(f"import sys, time\ndef main(options):\n    {program}\n")
        (tmp_path / "scratch").mkdir(exist_ok=True)
        return tmp_path / "scratch"

    monkeypatch.syspath_prepend(tmp_path / "fake")
    return make


#: As yt-dlp words them.
LINES = {
    "ERROR: [youtube] x: Video unavailable. This video has been removed by the uploader": ("missing_file", 1),
    "ERROR: [youtube] x: Private video. Sign in if you've been granted access to this video": ("denied", 1),
    "ERROR: [youtube] x: Sign in to confirm your age": ("denied", 1),
    "ERROR: Unsupported URL: http://h/x": ("unsupported", 1),
    "ERROR: [youtube] x: Requested format is not available. Use --list-formats": ("unsupported", 1),
    "ERROR: unable to download video data: HTTP Error 403: Forbidden": ("denied", 3),
    "ERROR: [generic] Unable to download webpage: HTTP Error 503: Service Unavailable": ("unreachable", 4),
    "ERROR: [generic] Unable to download webpage: The read operation timed out": ("unreachable", 4),
    "Traceback": ("unreachable", 4),
    "": ("unreachable", 4),
}


@pytest.mark.parametrize("line", LINES)
def test_error_lines_of_yt_dlp(fake, tmp_path, line):
    scratch = fake(f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); print({line!r}); sys.exit(1)")
    reason, runs = LINES[line]
    assert failure(PageSource("https://h/{stem}", QUICK), scratch) == reason
    assert len((tmp_path / "runs").read_text()) == runs


def test_more_than_was_stated_ends_at_the_size_limit(fake):
    endless = "file = open(options[options.index('--paths') + 1] + '/media.mp4.part', 'wb')\n    while True: "
    scratch = fake(endless + "file.write(bytes(4096)); file.flush(); time.sleep(0.001)")
    assert failure(PageSource("https://h/{stem}", QUICK), scratch) == "too_large"
    assert (scratch / "media.mp4.part").stat().st_size < 4 * QUICK.bytes


def test_a_program_that_hangs_ends_at_the_time_limit(fake):
    scratch = fake("time.sleep(60)")
    limits = dataclasses.replace(QUICK, seconds=1)
    assert failure(PageSource("https://h/{stem}", limits), scratch) == "timeout"


def test_a_full_disk_is_not_the_fault_of_the_file(fake):
    scratch = fake("print('ERROR: unable to write data: [Errno 28] No space left on device'); sys.exit(1)")
    with pytest.raises(OSError, match="No space left"):
        PageSource("https://h/{stem}", QUICK).fetch("x", scratch)


def test_yt_dlp_ends_with_the_process_that_started_it(fake, tmp_path):
    scratch = fake(f"import os; open({str(tmp_path / 'number')!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(60)")
    program = """
import pathlib, sys
from tests.helpers.servers.web_server import QUICK
from framestream.tools.fetch.ytdlp import PageSource
PageSource("https://h/{stem}", QUICK).fetch("x", pathlib.Path(sys.argv[1]))
"""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program, str(scratch)], env=paths)
    while not (tmp_path / "number").exists() or not (number := (tmp_path / "number").read_text()).endswith("."):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while is_yt_dlp(number[:-1]):
        assert time.monotonic() < end, "yt-dlp runs on without its parent"
        time.sleep(0.02)


def is_yt_dlp(number):
    """Return whether a process exists and is the one that runs yt-dlp."""
    try:
        return b"ytdlp_process" in Path(f"/proc/{number}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_yt_dlp_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(framestream.tools.fetch.ytdlp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"pip install -e '.\[pages\]'"):
        PageSource("https://h/{stem}", QUICK)
    with pytest.raises(ValueError):
        PageSource("https://h/x", QUICK)


def test_paths_and_folders(source):
    for ask in (lambda: source.find("../x"), lambda: source.find("a", tree=True)):
        with pytest.raises(FetchError) as error:
            ask()
        assert error.value.reason in ("outside_root", "unsupported")
