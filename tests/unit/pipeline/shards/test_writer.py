"""Shards as other programs read them: tar, webdataset, PyAV, decord, ffmpeg, Pillow and Arrow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import decord
import imageio_ffmpeg
import numpy as np
import pyarrow.json
import pytest
import simplejpeg
import webdataset
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg
from framestream.pipeline.shards.samples import dialogue_key, dialogue_metadata, media_key, media_metadata
from framestream.pipeline.shards.sidecars import write_sidecars
from framestream.pipeline.shards.writer import ShardInfo, ShardWriter
from tests.helpers.media.footage import BIKES, all_frames, number_of, numbered
from tests.helpers.paths import ROOT

JPEGS = [encode_jpeg(numbered(number), 90, "420") for number in range(100)]


@pytest.fixture(scope="module")
def footage() -> list[np.ndarray]:
    return all_frames(BIKES)[0][:24]


def _mp4(count: int = 8, first: float = 3.25) -> bytes:
    return mux_mjpeg(JPEGS[:count], first + np.arange(count), first + count, 64, 32)


# Frames ---------------------------------------------------------------------------------------------------------------


@given(
    gaps=st.lists(st.floats(0.002, 3000), min_size=1, max_size=40),
    first=st.floats(0, 36_000),
    last=st.floats(0, 100),
)
def test_presentation_times_are_the_source_seconds(gaps: list[float], first: float, last: float) -> None:
    seconds = first + np.cumsum([0.0, *gaps])
    jpegs = JPEGS[: len(seconds)]
    mp4 = mux_mjpeg(jpegs, seconds, seconds[-1] + last, 64, 32)
    offsets, sizes, timestamps = mjpeg_frames(mp4)
    assert (offsets.dtype, sizes.dtype, timestamps.dtype) == (np.int64, np.int32, np.float64)
    assert [mp4[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)] == jpegs
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = np.array([float(packet.pts * packet.time_base) for packet in packets])
        end = shown[-1] + float(packets[-1].duration * packets[-1].time_base)
        assert stream.frames == len(jpegs)
    assert np.abs(shown - seconds).max() < 1e-3 and np.abs(timestamps - seconds).max() < 1e-3
    assert (np.diff(shown) > 0).all()
    assert abs(end - (seconds[-1] + last)) < 1e-3


def test_frames_are_whole_jpegs_and_open_everywhere(footage: list[np.ndarray], tmp_path: Path) -> None:
    jpegs = [encode_jpeg(frame, 90, "420") for frame in footage]
    seconds = 12.4 + np.cumsum(np.random.default_rng(0).uniform(0.5, 2, len(jpegs)))
    mp4 = mux_mjpeg(jpegs, seconds, seconds[-1] + 1, 640, 272)
    path = tmp_path / "clip.mp4"
    path.write_bytes(mp4)

    for offset, size, frame in zip(*mjpeg_frames(mp4)[:2], footage, strict=True):
        jpeg = mp4[offset : offset + size]
        assert jpeg.startswith(b"\xff\xd8") and jpeg.endswith(b"\xff\xd9")
        with Image.open(io.BytesIO(jpeg)) as image:
            assert (image.format, image.size) == ("JPEG", (640, 272))
            np.testing.assert_array_equal(decode_jpeg(jpeg), np.asarray(image))
        assert np.abs(decode_jpeg(jpeg).astype(int) - frame).mean() < 5

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == "mjpeg"
        np.testing.assert_allclose([frame.time for frame in frames], seconds, atol=1e-3)
    reader = decord.VideoReader(str(path), num_threads=1)
    assert len(reader) == len(footage)
    np.testing.assert_allclose(reader.get_frame_timestamp(range(24))[:, 0], seconds - seconds[0], atol=1e-3)
    for index in (0, 7, 23):
        exact = decode_jpeg(jpegs[index]).astype(int)
        assert np.abs(reader[index].asnumpy() - exact).mean() < 4  # ffmpeg upsamples colour differently
        assert np.abs(frames[index].to_ndarray(format="rgb24") - exact).mean() < 4
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-fps_mode", "passthrough"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], check=True, capture_output=True)
    assert len(raw.stdout) == 24 * 640 * 272 and not raw.stderr


def test_the_same_frames_give_the_same_bytes(footage: list[np.ndarray]) -> None:
    program = (
        "import sys, hashlib, numpy as np\n"
        "from framestream.pipeline.media.jpeg import encode_jpeg\n"
        "from framestream.pipeline.media.mjpeg_mp4 import mux_mjpeg\n"
        "from tests.helpers.media.footage import BIKES, all_frames\n"
        "jpegs = [encode_jpeg(f, 90, '420') for f in all_frames(BIKES)[0][:24]]\n"
        "print(hashlib.sha256(mux_mjpeg(jpegs, 1.5 + np.arange(24), 30.0, 640, 272)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    here = mux_mjpeg([encode_jpeg(frame, 90, "420") for frame in footage], 1.5 + np.arange(24), 30.0, 640, 272)
    assert other.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_times_far_apart_and_equal_times_are_kept_in_order() -> None:
    far = np.array([0.0, 30_000.0, 90_000.5])  # over 6 hours, more than 90 kHz ticks can count in 31 bits
    np.testing.assert_allclose(mjpeg_frames(mux_mjpeg(JPEGS[:3], far, 150_000.0, 64, 32))[2], far, atol=1e-3)
    equal = mjpeg_frames(mux_mjpeg(JPEGS[:4], np.array([1.0, 1.0, 1.0, 2.0]), 2.0, 64, 32))[2]
    assert (np.diff(equal) > 0).all() and np.abs(equal - [1, 1, 1, 2]).max() < 1e-3


@pytest.mark.parametrize("seconds", [[], [1.0], [1.0, 0.5], [-1.0, 0.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_times_that_no_video_can_have_are_refused(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="timestamp"):
        mux_mjpeg(JPEGS[: len(seconds)] if len(seconds) != 1 else JPEGS[:2], np.array(seconds), 2.0, 64, 32)


@pytest.mark.parametrize("data", [b"", b"<html></html>", _mp4()[:2000], BIKES.read_bytes()])
def test_frames_of_anything_else_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        mjpeg_frames(data)


def test_jpegs_carry_the_quality_and_subsampling_asked_for(footage: list[np.ndarray]) -> None:
    for name, factors in (("420", (2, 2)), ("422", (2, 1)), ("444", (1, 1))):
        jpeg = encode_jpeg(footage[0], 90, name)
        frame_header = jpeg.index(b"\xff\xc0")  # SOF0: length, precision, height, width, 3, then id, H V, table
        assert divmod(jpeg[frame_header + 11], 16) == factors
    with Image.open(io.BytesIO(encode_jpeg(footage[0], 75, "420"))) as image:
        assert image.quantization[0][0] == 8  # 16 of the standard table at quality 75
    assert len(encode_jpeg(footage[0], 50, "420")) < len(encode_jpeg(footage[0], 95, "420"))


def test_jpegs_are_decoded_into_the_array_given(footage: list[np.ndarray]) -> None:
    jpeg = encode_jpeg(footage[0], 90, "420")
    pool = np.zeros((2, 272, 640, 3), np.uint8)
    assert decode_jpeg(jpeg, pool[1]) is not None
    np.testing.assert_array_equal(pool[1], decode_jpeg(jpeg))
    assert not pool[0].any()
    with pytest.raises(ValueError, match="640 x 272"):
        decode_jpeg(jpeg, pool[:, :64, :64][0])
    with pytest.raises(ValueError):
        decode_jpeg(jpeg[: len(jpeg) // 2])
    grey = simplejpeg.encode_jpeg(footage[0][:, :, :1].copy(), 90, "GRAY", "Gray")
    assert decode_jpeg(grey).shape == (272, 640, 3)


# Shards ---------------------------------------------------------------------------------------------------------------


def _write(path: Path, count: int = 5) -> tuple[ShardInfo, dict[str, dict[str, tuple[int, int]]]]:
    ranges = {}
    with ShardWriter(path) as shard:
        for number in range(count):
            key = media_key("video", str(number))
            ranges[key] = shard.add(key, {"mp4": _mp4(2 + number), "json": json.dumps({"key": key}).encode()})
    return shard.info, ranges


def _described(path: Path) -> ShardInfo:
    """What :class:`ShardInfo` says of a shard of two members a sample, read with the standard library."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        members = list(tar)
    end = members[-1].offset_data + members[-1].size + -members[-1].size % 512
    offsets = (*(member.offset for member in members[::2]), end)
    digests = hashlib.sha256(data).hexdigest(), hashlib.md5(data).hexdigest()
    return ShardInfo(path.name, len(members) // 2, len(data), *digests, offsets)


def test_shards_are_plain_tar_files(tmp_path: Path) -> None:
    info, ranges = _write(tmp_path / "train-000000.tar")
    path = tmp_path / info.name
    expected = [f"{key}.{extension}" for key in ranges for extension in ("mp4", "json")]
    listed = subprocess.run(["tar", "tf", str(path)], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == expected and not listed.stderr
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            assert (member.offset_data, member.size) == ranges[key][extension]
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.type, member.pax_headers) == ("", "", tarfile.REGTYPE, {})
    data = path.read_bytes()
    assert data[257:265] == b"ustar\x0000" and len(data) == info.bytes and len(data) % 10_240 == 0
    assert _described(path) == info
    assert [item.name for item in tmp_path.iterdir()] == [info.name]


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    info, ranges = _write(tmp_path / "train-000000.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / info.name), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(ranges)
    for number, sample in enumerate(samples):
        assert sample["mp4"] == _mp4(2 + number)
        assert json.loads(sample["json"]) == {"key": sample["__key__"]}


def test_a_member_is_a_video_whose_frames_have_offsets(tmp_path: Path) -> None:
    info, ranges = _write(tmp_path / "train-000000.tar")
    offset, size = list(ranges.values())[4]["mp4"]
    handle = os.open(tmp_path / info.name, os.O_RDONLY)
    member = os.pread(handle, size, offset)
    frame_offsets, frame_sizes, _ = mjpeg_frames(member)
    jpeg = os.pread(handle, int(frame_sizes[3]), offset + int(frame_offsets[3]))
    os.close(handle)
    assert number_of(decode_jpeg(jpeg)) == 3
    path = tmp_path / "member.mp4"
    path.write_bytes(member)
    reader = decord.VideoReader(str(path), num_threads=1)
    assert [number_of(reader[index].asnumpy()) for index in range(len(reader))] == list(range(6))


def test_the_same_samples_give_the_same_shard(tmp_path: Path) -> None:
    one, _ = _write(tmp_path / "train-000000.tar")
    (tmp_path / "again").mkdir()
    other, _ = _write(tmp_path / "again" / "train-000000.tar")
    assert one == other


def test_an_error_or_an_empty_shard_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "train-000000.tar") as shard:
        shard.add("v1", {"json": b"{}"})
        raise RuntimeError("stop")
    with ShardWriter(tmp_path / "train-000001.tar") as shard:
        pass
    assert shard.samples == 0 and not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    program = (
        "import os, signal, sys; from framestream.pipeline.shards.writer import ShardWriter\n"
        "with ShardWriter(sys.argv[1]) as shard:\n"
        "    shard.add('v1', {'json': bytes(100_000)})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL and not path.exists()
    info, _ = _write(path)
    assert _described(path) == info and [item.name for item in tmp_path.iterdir()] == [info.name]


@pytest.mark.parametrize(
    ("key", "members"),
    [
        ("1abc", {"json": b""}),
        ("a.b", {"json": b""}),
        ("a/b", {"json": b""}),
        ("", {"json": b""}),
        ("v1", {"json": b""}),  # there already
        ("v2", {"mp4": b"", "json": b""}),  # other members than the first sample
        ("v2", {"JSON": b""}),
        ("v2", {"gz": b""}),
        ("v2", {}),
        ("v" * 96, {"json": b""}),  # a name over 100 bytes
    ],
)
def test_names_that_some_reader_would_misread_are_refused(tmp_path: Path, key: str, members: dict) -> None:
    with ShardWriter(tmp_path / "train-000000.tar") as shard:
        shard.add("v1", {"json": b"{}"})
        with pytest.raises(ValueError, match="train-000000.tar"):
            shard.add(key, members)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert tar.getnames() == ["v1.json"]


# Keys, JSON and the files of other readers ---------------------------------------------------------------------------


def test_keys_are_the_first_24_hex_digits_of_a_sha256() -> None:
    digest = hashlib.sha256(b"root/a.mp4 12.4 27.9").hexdigest()[:24]
    assert media_key("video", "root/a.mp4 12.4 27.9") == "v" + digest
    assert media_key("image", "root/a.mp4 12.4 27.9") == "i" + digest
    assert dialogue_key("root/a.mp4 12.4 27.9") == "d" + digest


def test_json_members_have_one_schema_for_arrow() -> None:
    fields = dict(source="a.mp4", width=64, height=32, source_width=640, source_height=320, sha256="00")
    rich = dict(vlen=10, fps=25, duration=4, salvaged=True, sample=[0, 0], frame_index=[3], timestamps=[7])
    bare = dict(vlen=1, fps=0, duration=0, salvaged=False, sample=[0], frame_index=[0], timestamps=[0])
    about = [{"id": "7", "conversations": [{"from": "human", "value": "<image>\nÄ?"}]}]
    rows = [
        media_metadata(key="v1", kind="video", start=12.5, dialogues=about, **fields, **rich),
        media_metadata(key="i1", kind="image", start=0, **fields, **bare),
    ]
    alone = [pyarrow.json.read_json(io.BytesIO(row)).schema for row in rows]
    assert alone[0] == alone[1]
    assert json.loads(json.loads(rows[0])["dialogues"]) == about

    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes", "extra": 1}]
    common = dict(key="d1", id=7, entry="e", split="train")
    rows = [
        dialogue_metadata(media=["v1", "i1"], conversations=turns, meta={"duration": 3.5}, **common),
        dialogue_metadata(media=[], conversations=turns, meta={}, **common),
    ]
    alone = [pyarrow.json.read_json(io.BytesIO(row)).schema for row in rows]
    assert alone[0] == alone[1]
    assert json.loads(json.loads(rows[0])["media"]) == ["v1", "i1"]
    assert json.loads(json.loads(rows[1])["conversations"])[1] == {"from": "gpt", "value": "yes"}
    with pytest.raises(ValueError):
        media_metadata(key="v1", kind="video", start=float("nan"), **fields, **rich)


def test_energon_and_wids_files_describe_the_shards(tmp_path: Path) -> None:
    folder = tmp_path / "video"
    folder.mkdir()
    names = ("train-000000.tar", "train-000001.tar", "val-000000.tar")
    infos = [_write(folder / name, count)[0] for name, count in zip(names, (3, 2, 1), strict=True)]
    write_sidecars(folder, infos[::-1])

    meta = folder / ".nv-meta"
    info = json.loads((meta / ".info.json").read_text())
    assert set(info) == {"energon_version", "shard_counts"}
    assert list(info["shard_counts"].items()) == list(zip(names, (3, 2, 1), strict=True))
    parts = {"train": list(names[:2]), "val": [names[2]], "test": []}
    assert yaml.safe_load((meta / "split.yaml").read_text()) == {"exclude": [], "split_parts": parts}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    assert yaml.safe_load((meta / "dataset.yaml").read_text()) == dataset

    for name, count in zip(names, (3, 2, 1), strict=True):
        offsets = np.fromfile(folder / f"{name}.idx", "<u8").astype(np.int64)
        assert len(offsets) == count + 1
        data = (folder / name).read_bytes()
        with tarfile.open(folder / name) as tar:
            first = [member.offset for member in tar if member.name.endswith(".mp4")]
        assert offsets[:-1].tolist() == first and not any(data[offsets[-1] :]) and any(data[offsets[-1] - 512 :])

    index = json.loads((folder / "shardindex.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [(part["url"], part["nsamples"]) for part in index["shardlist"]] == [(names[0], 3), (names[1], 2)]
    for part in index["shardlist"]:
        data = (folder / part["url"]).read_bytes()
        assert (part["filesize"], part["md5sum"]) == (len(data), hashlib.md5(data).hexdigest())
    held_out = json.loads((folder / "shardindex-val.json").read_text())
    assert [part["url"] for part in held_out["shardlist"]] == [names[2]]
