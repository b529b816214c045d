"""The build command with hanging or crashing decoders, a full disk, or stopped by a user: nothing else is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from av.codec.hwaccel import hwdevices_available

import framestream.tools.builder.build
import framestream.tools.builder.executors
import framestream.tools.builder.task
import framestream.tools.fetch.archives.archive
from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from framestream.tools import build_shards
from framestream.tools.builder.task import make_worker
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.media.memory_files import pack
from tests.helpers.servers.web_server import Server

SCRIPT = Path(build_shards.__file__)
NAMES = tuple("abcdefgh")
SAID = "Stopped. Run the same command to continue.\n"


def command(folder: Path, out: str, *options: str, roots: dict | None = None, **data: object) -> list[str]:
    """Arguments of a build of the films in FOLDER/films.zip to FOLDER/OUT/stage2."""
    root = "https://example.org/films"
    places = {root: {"archives": f"dir:{folder}/films.zip"}, **(roots or {})}
    (folder / "roots.yaml").write_text(yaml.safe_dump(places))
    fields = {"roots": str(folder / "roots.yaml"), "cache": str(folder / "cache"), "shard_mb": 1, **data}
    fields.setdefault("entries", [{"annotation": str(folder / "films.json"), "root": root}])
    frames = {"sampler": "middle", "min": 4, "max": 4, "size": 64}
    manifest = corpus.manifest(folder / "m.yaml", [], data=fields, frames=frames, model={"vision_tower": {"patch": 8}})
    return ["--stage", "2", "--manifest", str(manifest), "--workers", "1", "--out", str(folder / out), *options]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("failures")
    films = {f"{name}.mp4": corpus.video(made / "v.mp4", 1, seed=n).read_bytes() for n, name in enumerate(NAMES)}
    (made / "films.zip").write_bytes(pack(films, "stored"))
    samples = [{"id": name, "video": f"{name}.mp4", "conversations": TURNS} for name in NAMES]
    corpus.annotations(made / "films.json", [*samples, {"id": "text", "conversations": TEXT}])
    return made


@pytest.fixture(scope="module")
def whole(folder):
    """What an undisturbed build leaves."""
    assert build_shards.main(command(folder, "whole")) == 0
    return snapshot(folder / "whole")


def outcomes(root: Path) -> dict[str, tuple[str, int]]:
    """Reason and attempts of each media item that was left out, by name."""
    rows = read_ledger(root).to_pylist()
    return {Path(row["source"]).stem: (row["reason"], row["attempts"]) for row in rows if row["kind"] == "media"}


# Decoders -------------------------------------------------------------------------------------------------------------

STOPPED = signal.SIGSTOP  # which a process cannot answer in any way


def worse(job):
    """A worker with files that hang or crash it: while they are fetched, ahead of others, or while they are decoded."""
    told = {"fetch b": signal.SIGSEGV, "decode c": STOPPED, "decode e": signal.SIGSEGV, "fetch g": STOPPED}
    make, fetch = framestream.tools.builder.task.encode_video, framestream.tools.builder.task._MediaSources.fetch

    def trouble(what):
        if sent := told.get(what):
            os.kill(os.getpid(), sent)

    def make_video(*arguments):
        trouble(f"decode {Path(arguments[-1].name).stem}")
        return make(*arguments)

    def fetch_file(self, item, scratch):
        trouble(f"fetch {Path(item['path']).stem}")
        return fetch(self, item, scratch)

    (
        framestream.tools.builder.task.encode_video,
        framestream.tools.builder.task._MediaSources.fetch,
        framestream.tools.builder.task.FETCH_GRACE,
    ) = (
        make_video,
        fetch_file,
        1,
    )
    return make_worker(job)


def test_what_hangs_or_crashes_costs_its_item_alone(folder, whole, monkeypatch, capfd):
    monkeypatch.setattr(framestream.tools.builder.executors, "make_worker", worse)
    assert build_shards.main(command(folder, "worse", decode_timeout=3, fetch_timeout=2)) == 0
    root, crashed, hung = folder / "worse" / "stage2", ("crashed", 2), ("timeout", 1)
    assert outcomes(root) == {"b": crashed, "c": hung, "e": crashed, "g": hung}
    assert set(Index.open(root).dialogues["id"].to_pylist()) == {*NAMES, "text"} - {"b", "c", "e", "g"}
    monkeypatch.undo()
    assert build_shards.main(command(folder, "worse", "--retry-failed")) == 0
    assert outcomes(root) == {} and len(Index.open(root).dialogues) == len(NAMES) + 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("decoder", ["decord", "ffmpeg"])
def test_another_decoder_builds_another_root(folder, whole, decoder, capsys):
    assert build_shards.main(command(folder, decoder, decoder=decoder)) == 0
    record = json.loads((folder / decoder / "stage2" / "build.json").read_text())
    assert record["specification"]["data"]["decoder"] == decoder
    for out, options, text in (("whole", {"decoder": decoder}, "'auto' and"), (decoder, {}, f"'{decoder}' and")):
        before = snapshot(folder / out)
        capsys.readouterr()
        assert build_shards.main(command(folder, out, **options)) == 2
        assert f"contains another build: data.decoder was {text} is now" in capsys.readouterr().err
        assert snapshot(folder / out) == before
    for name in ("frame_index", "timestamps", "source"):
        expected, found = (Index.open(folder / out / "stage2").media[name].to_pylist() for out in ("whole", decoder))
        assert found == expected


def test_a_decoder_or_device_that_is_missing_ends_the_build(folder, monkeypatch, capfd):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "decord", None)
        assert build_shards.main(command(folder, "missing", decoder="decord")) == 2
    lacking = ({"cuda", "vaapi", "qsv"} - set(hwdevices_available())).pop()
    assert build_shards.main(command(folder, "missing", hwaccel=lacking)) == 2
    assert not (folder / "missing").exists()
    err = capfd.readouterr().err
    assert "data.decoder: decord needs the package decord2" in err and "Traceback" not in err
    assert "data.hwaccel: PyAV" in err
    monkeypatch.setattr(framestream.tools.builder.executors, "ray", lambda address: lambda job, tasks: iter(()))
    assert build_shards.main(command(folder, "missing", "--executor", "ray", hwaccel=lacking)) == 0  # others decode
    assert (folder / "missing" / "stage2" / "work" / "plan").is_dir()


# Disks ----------------------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for_files(job):
    framestream.tools.fetch.archives.archive.ArchiveSource.fetch = full
    return make_worker(job)


def full_for_shards(job):
    framestream.tools.builder.task.ShardWriter.add = full
    return make_worker(job)


@pytest.mark.parametrize("what", [full_for_files, full_for_shards, "finish"])
def test_a_full_disk_ends_the_build_with_one_line_and_it_goes_on(folder, whole, monkeypatch, capfd, what):
    out = getattr(what, "__name__", "finish")
    if what == "finish":
        monkeypatch.setattr(framestream.tools.builder.build, "finish", full)
    else:
        monkeypatch.setattr(framestream.tools.builder.executors, "make_worker", what)
    assert build_shards.main(command(folder, out)) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "\r" not in line]
    assert line.startswith("error: ") and "no space left" in line and "free some and repeat the command" in line
    monkeypatch.undo()
    assert build_shards.main(command(folder, out)) == 0
    assert snapshot(folder / out) == whole


# Stopped --------------------------------------------------------------------------------------------------------------


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    kept = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(
        command,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def until(ready, process: subprocess.Popen) -> None:
    while not ready():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


@pytest.mark.parametrize("step", ["work/plan.tmp", "work/tasks", "work/tasks/*.tmp/shard.tar"])
def test_ctrl_c_says_one_line_and_the_build_goes_on(folder, whole, tmp_path, step):
    """Sent to the whole process group, as a terminal does it."""
    root = tmp_path / "stage2"
    arguments = command(folder, str(tmp_path))
    process = start(arguments)
    until(lambda: list(root.glob(step)), process)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, SAID)
    assert build_shards.main(arguments) == 0
    assert snapshot(tmp_path) == whole


def test_ctrl_c_while_a_server_says_nothing(folder, tmp_path):
    with Server() as server:
        server.routes["/notes.json"] = lambda request: request.stall()
        entry = {"annotation": f"{server.url}/notes.json", "root": "https://example.org/films"}
        process = start(command(folder, str(tmp_path), entries=[entry]))
        until(lambda: server.asked, process)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=15)
    assert (process.returncode, said) == (130, SAID)


def marked(text: str) -> list[int]:
    """Processes with a text in their environment."""
    found = []
    for item in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in item.read_bytes():
                found.append(int(item.parent.name))
        except OSError:
            continue
    return found


def test_nothing_outlives_a_parent_that_is_killed(folder, tmp_path):
    """Workers, the threads in which they fetch, and yt-dlp, all of which wait for a server that says nothing."""
    mark = uuid.uuid4().hex
    with Server() as server:
        names = [f"{number}.mp4" for number in range(3)]
        server.routes |= {f"/{kind}/{name}": lambda r: r.stall() for kind in ("page", "file") for name in names}
        roots, entries = {}, []
        for kind in ("page", "file"):
            samples = [{"video": name, "conversations": TURNS} for name in names]
            split = {"page": "train", "file": "val"}[kind]
            file = corpus.annotations(tmp_path / f"{kind}.json", samples)
            entries.append({"annotation": str(file), "root": f"https://example.org/{kind}", "split": split})
        roots["https://example.org/page"] = f"page:{server.url}/page/{{path}}"
        roots["https://example.org/file"] = f"url:{server.url}/file/{{path}}"
        arguments = command(folder, str(tmp_path / "out"), "--workers", "2", roots=roots, entries=entries)
        process = start(arguments, FRAMESTREAM_TEST=mark)
        until(lambda: len({path for path, _ in server.asked}) == 6, process)
        assert len(marked(mark)) >= 1 + 2 + 3, "the command, two workers and a yt-dlp for each page"
        process.kill()
        process.wait()
        while marked(mark):
            time.sleep(0.01)
