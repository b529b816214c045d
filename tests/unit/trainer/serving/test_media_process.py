"""Files of clients are decoded within limits, and a decoder that ends is replaced."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.shards.memory_index import MediaFile
from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.media import UploadReader, decode_data_url, limit_frames, receive_media
from framestream.trainer.serving.media_process import DecodeJob, MediaProcess, decode_job
from framestream.trainer.serving.requests import MediaReference
from framestream.trainer.serving.uploads import PrivateFile, UploadStore
from tests.helpers.corpora.training_corpus import COLOURS, write_video
from tests.helpers.model.manifests import manifest

MANIFEST = manifest(128)
MANIFEST = dataclasses.replace(MANIFEST, frames=dataclasses.replace(MANIFEST.frames, min=4, max=8))
CONFIG = ServingConfig()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "film.mp4", COLOURS["red"], 4)
    (folder / "film.mp4").rename(folder / "film")
    (folder / "cut").write_bytes((folder / "film").read_bytes()[:3000])
    (folder / "page").write_bytes(b"<!doctype html><title>Not found</title>")
    Image.new("RGB", (300, 200), "red").save(folder / "image", "PNG")
    (folder / "half").write_bytes((folder / "image").read_bytes()[:100])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb", "PNG")
    Image.new("1", (7000, 7000)).save(folder / "wide", "PNG")
    frames = [Image.new("L", (40, 40), n) for n in range(8)]
    frames[0].save(folder / "gif", "GIF", save_all=True, append_images=frames[1:], duration=200)
    return folder


def job(path: Path, kind: str = "", start: float | None = None, end: float | None = None) -> DecodeJob:
    return DecodeJob(MediaFile(path, start, end), kind, "messages[0].content[0]", MANIFEST)


@pytest.mark.parametrize(
    ("name", "kind", "reader"),
    [("film", "video", "decord"), ("film", "", "decord"), ("gif", "video", "gif"), ("image", "", "still")],
)
def test_the_kind_of_a_file_is_found_in_its_bytes(files, name, kind, reader):
    found = decode_job(job(files / name, kind), CONFIG)
    assert found.reader == reader
    assert found.encode(MANIFEST).data == MediaFile(files / name, reader=reader).encode(MANIFEST).data


@pytest.mark.parametrize(
    ("name", "kind", "limits", "status", "why"),
    [
        ("page", "video", {}, 415, "whatever its name says"),
        ("page", "image", {}, 415, "whatever its name says"),
        ("page", "", {}, 415, "whatever its name says"),
        ("film", "image", {}, 415, "give it as a video"),
        ("image", "video", {}, 415, "give it as image_url"),
        ("cut", "video", {}, 422, "truncated|ends before|damaged"),
        ("half", "image", {}, 422, "cannot be decoded"),
        ("bomb", "image", {}, 413, "too many pixels"),
        ("wide", "", {}, 413, "7000 x 7000 pixels, and the limit is 33,554,432"),
        ("bomb", "", {}, 413, "pixels"),
        ("film", "video", {"max_pixels": 9000}, 413, "96 x 96 pixels"),
        ("gif", "video", {"max_pixels": 1500}, 413, "40 x 40 pixels"),
        ("film", "video", {"max_seconds": 3.0}, 413, "shows 4 seconds"),
    ],
)
def test_what_cannot_be_shown_is_refused(files, name, kind, limits, status, why):
    with pytest.raises(RequestError, match=why) as refused:
        decode_job(job(files / name, kind), dataclasses.replace(CONFIG, **limits))
    assert refused.value.status == status and refused.value.param == "messages[0].content[0]"
    assert str(files) not in refused.value.message, "no path of the server"


def test_a_part_of_a_long_video_is_shown(files):
    limits = dataclasses.replace(CONFIG, max_seconds=2.0)
    found = decode_job(job(files / "film", "video", 1, 2.5), limits)
    times = found.encode(MANIFEST).columns["timestamps"]
    assert min(times) >= 1 and max(times) < 2.5
    with pytest.raises(RequestError, match="no frames from 50 s") as refused:
        decode_job(job(files / "film", "video", 50, 51), limits)
    assert refused.value.status == 422


@pytest.fixture(scope="module")
def process():
    process = MediaProcess(CONFIG)
    yield process
    process.close()


def test_a_process_answers_and_is_replaced(files, process):
    first = process.run(job(files / "film", "video"))
    assert first.encode(MANIFEST).data == decode_job(job(files / "film", "video"), CONFIG).encode(MANIFEST).data
    with pytest.raises(RequestError) as refused:
        process.run(job(files / "page", "video"))
    assert refused.value.status == 415 and refused.value.code == "not_media"
    os.kill(process._process.pid, signal.SIGSTOP)
    slow = dataclasses.replace(CONFIG, decode_seconds=0.05)
    process._config = slow
    with pytest.raises(RequestError, match="not decoded within 0.05 seconds") as refused:
        process.run(job(files / "film", "video"))
    assert refused.value.status == 422 and process._process is None
    process._config = CONFIG
    assert process.run(job(files / "image")).reader == "still"


def test_a_process_that_dies_is_one_error(files, process):
    process.run(job(files / "image"))
    os.kill(process._process.pid, signal.SIGSTOP)
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.join()
    assert process.run(job(files / "image")).reader == "still", "it was dead before"


def test_memory_of_a_process_is_bounded(files):
    small = MediaProcess(dataclasses.replace(CONFIG, decode_bytes=1 << 24))
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (3000, 3000, 3), dtype=np.uint8)).save(data, "PNG")
    (files / "large").write_bytes(data.getvalue())
    try:
        with pytest.raises(RequestError) as refused:
            small.run(job(files / "large", "image"))
        assert refused.value.status in (413, 422)
    finally:
        small.close()


def test_frames_are_limited_in_complete_clips():
    assert limit_frames(MANIFEST, None) is MANIFEST and limit_frames(MANIFEST, 100) is MANIFEST
    assert [limit_frames(MANIFEST, n).frames.max for n in (1, 4, 7, 8)] == [4, 4, 4, 8]


@pytest.mark.parametrize("url", ["data:video/mp4;base64,AA==", "data:;base64,AA==", "data:a/b;charset=x;base64,AA=="])
def test_data_urls_are_read(url):
    assert decode_data_url(url, "file") == b"\0"


@pytest.mark.parametrize("url", ["data:video/mp4,AA==", "data:video/mp4;base64", "data:video/mp4;base64,A*A", "data:,"])
def test_other_data_urls_are_refused(url):
    with pytest.raises(RequestError, match="base64") as refused:
        decode_data_url(url, "file")
    assert refused.value.status == 400


def test_a_file_that_no_request_can_use_is_refused_at_upload(files, tmp_path):
    """As a request refuses it, but without decoding; a long video stays usable by its parts."""
    (tmp_path / "code.py").write_text("import os\n" * 50)
    reader = UploadReader(dataclasses.replace(CONFIG, decode_processes=1, max_seconds=1.0))
    try:
        for path in (files / "film", files / "gif", files / "image"):
            reader.check(PrivateFile(path, "", 0), "file")
        for path, status in ((tmp_path / "code.py", 415), (files / "page", 415), (files / "cut", 422)):
            with pytest.raises(RequestError) as early:
                reader.check(PrivateFile(path, "", 0), "file")
            with pytest.raises(RequestError) as late:
                decode_job(dataclasses.replace(job(path), param="file"), CONFIG)
            assert early.value.status == status and early.value.to_dict() == late.value.to_dict()
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("/tmp/film.mp4", "'/tmp/film.mp4' is a path; upload the file, or send a data: URL"),
        ("C:\\film.mp4", "is a path;"),
        ("/" + "x" * 100, f"'/{'x' * 39}' is a path;"),
        ("AAAAIGZ0/" * 500, "is no address;"),
        ("", "'' is no address;"),
        ("file:///etc/passwd", "addresses of the kind 'file' are not read;"),
    ],
)
def test_what_is_no_address_is_said(url, why):
    store = UploadStore(100)
    try:
        with pytest.raises(RequestError) as refused:
            receive_media(MediaReference("messages[0].content[0].video_url", "video", url), store, CONFIG)
    finally:
        store.close()
    assert refused.value.status == 400 and why in refused.value.message
