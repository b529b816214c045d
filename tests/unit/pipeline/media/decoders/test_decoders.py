"""Every decoder gives the frames that PyAV gives, or refuses a file in one line."""

from __future__ import annotations

import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.decode import Decoded, VideoRequest, decode_video
from framestream.pipeline.media.decoders import ffmpeg_decoder
from framestream.pipeline.media.decoders.base import DecoderConfig
from framestream.pipeline.media.decoders.choice import check_decoder, decoder_versions, get_decoder
from framestream.pipeline.media.decoders.ffmpeg_program import (
    FfmpegPass,
    FfmpegProgram,
    ffmpeg_arguments,
    find_ffmpeg,
)
from framestream.pipeline.media.errors import DecoderError, MediaError
from tests.helpers.media import odd_media as odd
from tests.helpers.media.footage import FOOTAGE, number_of, numbered, write_video

MANY = FramesConfig(sampler="middle", min=16, max=16, size=64)
SHORT = {"g": "12", "bf": "0"}
B_FRAMES = {"g": "12", "bf": "2"}
OPEN_GROUPS = {"x264-params": "keyint=25:open-gop=1:bframes=3"}
CLOSED = "keyint=12:open-gop=0:log-level=none"
TURNED = (0, 1, -1, 0)


def read(path: Path, decoder: str, start: float | None = None, end: float | None = None) -> Decoded:
    return decode_video(path, VideoRequest("decord", MANY, start, end, decoding=DecoderConfig(decoder)))


def animation(path: Path, count: int = 20, size: tuple[int, int] = (64, 32), **options: object) -> Path:
    images = [Image.fromarray(numbered(number)).resize(size) for number in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40, **options)
    return path


def check_same(path: Path, decoder: str, start: float | None = None, end: float | None = None) -> None:
    """Check that a decoder gives the frames of PyAV, with their numbers and times."""
    expected, found = read(path, "pyav", start, end), read(path, decoder, start, end)
    for name in ("vlen", "fps", "start", "duration", "source_width", "source_height", "damage"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("sample", "frame_index", "timestamps"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert np.abs(found.frames.astype(int) - expected.frames).mean() < 0.5


#: what every decoder reads
COMMON = {
    "h264.mp4": odd.numbered_video(100),
    "mpeg4.mp4": odd.numbered_video(100, "mpeg4", options=SHORT),
    "hevc.mkv": odd.numbered_video(60, "libx265", options={"x265-params": "keyint=12:bframes=0:log-level=none"}),
    "vp9.webm": odd.numbered_video(60, "libvpx-vp9", options={"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "mjpeg.avi": odd.numbered_video(40, "mjpeg", "yuvj420p", options={}),
    "ffv1.mkv": odd.numbered_video(40, "ffv1", "yuv444p", options={}),
    "deep.mp4": odd.numbered_video(40, "libx264", "yuv420p10le"),
    "turned.mp4": odd.numbered_video(60, matrix=TURNED),
    "upside-down.mp4": odd.numbered_video(60, matrix=(-1, 0, 0, -1)),
    "fragments.mp4": odd.remuxed(odd.numbered_video(100), "-movflags", "frag_keyframe+empty_moov"),
    "asf.wmv": odd.numbered_video(100, "wmv2", options={"g": "12"}),
    "late.mkv": odd.remuxed(odd.numbered_video(60), before=("-itsoffset", "3"), to="matroska"),
    "after-cover.mp4": odd.cover_before_video,
    "second.mkv": odd.two_videos,
    "uneven.mp4": odd.numbered_video(60, options=SHORT, seconds=np.cumsum(np.linspace(0, 0.2, 60)).tolist()),
}
#: what ffmpeg reads, and decord refuses for the reason given
NOT_DECORD = {
    "open.ts": (odd.numbered_video(100, options=OPEN_GROUPS), "transport"),
    "closed.ts": (odd.numbered_video(100), "transport"),
    "open.mp4": (odd.numbered_video(100, options=OPEN_GROUPS), "stored after a key frame"),
    "b-frames.mp4": (odd.numbered_video(100, "mpeg4", options=B_FRAMES), "stored after a key frame"),
    "apng.png": (animation, "no times|cannot open|counts|transparent"),
    "hevc-b.mkv": (odd.numbered_video(60, "libx265", options={"x265-params": CLOSED}), "decord stops at frame"),
    "mirrored.mp4": (odd.numbered_video(60, matrix=(0, -1, -1, 0)), "mirror"),
    "cut.mp4": (odd.remuxed(odd.numbered_video(100), before=("-ss", "1.3")), "key frame at the beginning"),
    "late-key.mkv": (
        odd.remuxed(odd.numbered_video(60), "-bsf:v", "noise=drop=eq(n\\,0)", to="matroska"),
        "key frame at the",
    ),
    "h264.avi": (odd.numbered_video(100, options=SHORT), "other times"),
    "mpeg1.mpg": (odd.numbered_video(100, "mpeg1video", options=SHORT), "transport"),
    "raw.h264": (odd.numbered_video(100, options=SHORT, container="h264"), "no times"),
    "alpha.mov": (odd.numbered_video(30, "qtrle", "argb", options={}), "transparent"),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, make in COMMON.items():
        make(folder / name)
    for name, (make, _) in NOT_DECORD.items():
        make(folder / name)
    return folder


@pytest.mark.parametrize("decoder", ["decord", "ffmpeg", "auto"])
@pytest.mark.parametrize("name", COMMON)
def test_decoders_give_equal_frames(videos: Path, name: str, decoder: str) -> None:
    check_same(videos / name, decoder)
    vlen, duration = read(videos / name, "pyav").vlen, read(videos / name, "pyav").duration
    for start, end in ((0.3, 0.6), (0.8, 0.95)):
        check_same(videos / name, decoder, start * duration, end * duration)
    decoded = read(videos / name, decoder)
    assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist() and max(decoded.sample) < vlen


@pytest.mark.parametrize("decoder", ["decord", "ffmpeg"])
@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted"])
def test_decoders_give_equal_frames_of_real_films(name: str, decoder: str) -> None:
    check_same(FOOTAGE / f"{name}.mp4", decoder, 1.0, 2.5)


@pytest.mark.parametrize("name", NOT_DECORD)
def test_decord_refuses_what_it_reads_wrongly_and_ffmpeg_reads_it(videos: Path, name: str) -> None:
    with pytest.raises(MediaError, match=NOT_DECORD[name][1]) as caught:
        read(videos / name, "decord")
    assert caught.value.reason == "unsupported"
    assert str(caught.value).endswith("set data.decoder: auto") and "\n" not in str(caught.value)
    check_same(videos / name, "ffmpeg")


def test_decord_is_right_for_every_frame_in_any_order(videos: Path) -> None:
    for name in COMMON:
        source = get_decoder(DecoderConfig("decord")).open(videos / name, lambda frame: frame)
        count = len(source.seconds)
        for numbers in (np.arange(count), np.arange(5, count, 13), np.array([count - 1])):
            assert [number_of(frame) for frame in source.decode_frames(numbers)] == numbers.tolist()


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 96, 144])
def test_decord_reads_rows_that_are_padded(tmp_path: Path, width: int) -> None:
    odd.numbered_video(4, "mjpeg", "yuvj420p", options={}, size=(width, 32))(tmp_path / "narrow.avi")
    check_same(tmp_path / "narrow.avi", "decord")


def test_padding_that_decord_calls_channels_is_removed() -> None:
    from framestream.pipeline.media.decoders.decord_decoder import _pixels

    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 3), np.uint8)
    padded = np.zeros((6, 128), np.uint8)
    padded[:, :96] = pixels.reshape(6, 96)
    np.testing.assert_array_equal(_pixels(padded.reshape(6, 32, 4), 32), pixels)


def test_ffmpeg_is_told_only_so_many_ranges(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (1, 2, 1000):
        monkeypatch.setattr(ffmpeg_decoder, "MAX_RANGES", limit)
        for name in ("h264.mp4", "raw.h264"):
            check_same(videos / name, "ffmpeg")


def test_animated_webp_is_read_by_ffmpeg_alone(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.webp", lossless=True)
    for decoder in ("auto", "ffmpeg"):
        decoded = read(path, decoder)
        assert (decoded.vlen, decoded.fps, decoded.duration, decoded.salvaged) == (20, 25.0, 0.8, False)
        assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()
        np.testing.assert_allclose(decoded.timestamps, decoded.frame_index * 0.04)
    for decoder in ("pyav", "decord"):
        with pytest.raises(MediaError, match="animated WebP image, .* data.decoder: auto or ffmpeg"):
            read(path, decoder)


def test_transparent_pixels_are_black_with_ffmpeg(tmp_path: Path) -> None:
    half = np.full((32, 64, 4), (200, 100, 0, 255), np.uint8)
    half[:, 32:] = (255, 0, 254, 0)
    images = [Image.fromarray(half), Image.fromarray(half[::-1, ::-1])]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True, exact=True)
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:])
    for name in ("a.webp", "a.png"):
        frames = read(tmp_path / name, "ffmpeg").frames
        assert frames[0, 32, 8].tolist() == [200, 100, 0] and frames[0, 32, 56].tolist() == [0, 0, 0]
        assert frames[1, 32, 56].tolist() == [200, 100, 0] and frames[1, 32, 8].tolist() == [0, 0, 0]


def test_damaged_files_are_read_up_to_the_damage_by_ffmpeg(tmp_path: Path) -> None:
    odd.damaged_packet(odd.numbered_video(100), 60)(tmp_path / "damaged.mp4")
    animation(tmp_path / "whole.webp", lossless=True)
    data = (tmp_path / "whole.webp").read_bytes()
    (tmp_path / "cut.webp").write_bytes(data[: len(data) * 9 // 10])
    for name, low, high in (("damaged.mp4", 50, 62), ("cut.webp", 16, 19)):
        decoded = read(tmp_path / name, "ffmpeg")
        assert decoded.salvaged and low <= decoded.vlen <= high
        assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()
    for size, text in ((40, "none.webp: ffmpeg decodes no frame of it"), (100, "only 1 frames before that")):
        (tmp_path / "none.webp").write_bytes(data[:size])
        with pytest.raises(MediaError, match=text) as caught:
            read(tmp_path / "none.webp", "auto")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["-i.mp4", "a'b,c:[0];d.mp4", "$(touch hacked) 100%d.mp4"])
def test_names_of_files_are_only_names_for_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", 20).rename(tmp_path / name)
    assert read(Path(name), "ffmpeg").vlen == 20
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_webp_with_too_many_pixels_is_refused(tmp_path: Path) -> None:
    data = bytearray(animation(tmp_path / "a.webp", 2, lossless=True).read_bytes())
    data[24:30] = b"\xff\xff\x3f" * 2
    (tmp_path / "a.webp").write_bytes(data)
    with pytest.raises(MediaError, match="pixels are too many") as caught:
        read(tmp_path / "a.webp", "auto")
    assert caught.value.reason == "unsupported"


# Programs and packages ------------------------------------------------------------------------------------------------


def fake_ffmpeg(folder: Path, version: str, then: str) -> Path:
    """Write a program ffmpeg that reports ``version``, and else does ``then``."""
    folder.mkdir()
    program = folder / "ffmpeg"
    program.write_text(f'#!/bin/sh\nif [ "$1" = -version ]; then echo "ffmpeg version {version} x"; exit; fi\n{then}\n')
    program.chmod(0o755)
    return program


def test_ffmpeg_on_the_path_comes_first(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_ffmpeg(tmp_path / "mine", "7.7-mine", f'touch {tmp_path}/used; exec {find_ffmpeg(True).path} "$@"')
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert decoder_versions(DecoderConfig("ffmpeg")) == {"ffmpeg": "7.7-mine"}
    check_same(videos / "h264.mp4", "ffmpeg")
    assert (tmp_path / "used").exists()
    (tmp_path / "used").unlink()
    assert read(animation(tmp_path / "a.webp", lossless=True), "auto").vlen == 20
    assert not (tmp_path / "used").exists()


def test_ffmpeg_is_stopped_at_the_time_limit(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_ffmpeg(tmp_path / "slow", "7.1", "exec sleep 600")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    request = VideoRequest("decord", MANY, decoding=DecoderConfig("ffmpeg", seconds=0.2))
    with pytest.raises(MediaError, match="ffmpeg needed more than 0.2 s; raise data.decode_timeout") as caught:
        decode_video(videos / "h264.mp4", request)
    assert caught.value.reason == "timeout"


@pytest.mark.parametrize(
    ("version", "text"), [("4.4.2-0ubuntu", "5.1 or newer is needed"), ("", "not a working ffmpeg")]
)
def test_an_ffmpeg_that_cannot_serve_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, text: str
) -> None:
    program = fake_ffmpeg(tmp_path / "old", version, "exit 1")
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    with pytest.raises(DecoderError, match=f"^data.decoder: {program} .*{text}") as caught:
        check_decoder(DecoderConfig("ffmpeg"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("decoder", "module", "package"),
    [
        ("decord", "decord", "decord2"),
        ("ffmpeg", "ffmpeg", "ffmpeg-python"),
        ("ffmpeg", "imageio_ffmpeg", "imageio-ffmpeg"),
    ],
)
def test_a_package_that_is_missing_is_named(
    videos: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for attempt in (lambda: check_decoder(DecoderConfig(decoder)), lambda: read(videos / "h264.mp4", decoder)):
        with pytest.raises(DecoderError, match=f"^data.decoder: .*{package} .*; pip install {package}$"):
            attempt()
    assert read(videos / "h264.mp4", "auto").vlen == 100


@pytest.mark.parametrize("decoder", ["pyav", "ffmpeg"])
def test_a_device_that_is_missing_is_one_line(videos: Path, decoder: str) -> None:
    config = DecoderConfig(decoder, "cuda")
    try:
        check_decoder(config)
    except DecoderError as error:
        assert str(error).startswith("data.hwaccel: cuda cannot be used on this machine (") and "\n" not in str(error)
    else:
        pytest.skip("this machine has the device")
    with pytest.raises(DecoderError, match="^data.hwaccel: cuda cannot be used on this machine"):
        decode_video(videos / "h264.mp4", VideoRequest("decord", MANY, decoding=config))


def test_ffmpeg_is_told_the_device_before_the_file() -> None:
    run = FfmpegPass(Path("a.mp4"), 0, Fraction(1, 25), hwaccel="vaapi")
    arguments = ffmpeg_arguments(FfmpegProgram("ffmpeg", "7.1"), run, 60)
    assert arguments.index("-hwaccel") < arguments.index("-i") == arguments.index("file:a.mp4") - 1
    assert arguments[arguments.index("-hwaccel") + 1] == "vaapi"


def test_kinds_of_devices_that_pyav_lacks_are_named(videos: Path) -> None:
    lacking = {"cuda", "vaapi", "qsv"} - set(av.codec.hwaccel.hwdevices_available())
    for kind in lacking:
        with pytest.raises(DecoderError, match=f"is built without {kind}; set data.decoder: ffmpeg"):
            check_decoder(DecoderConfig("pyav", kind))
    assert lacking != {"cuda", "vaapi", "qsv"}
