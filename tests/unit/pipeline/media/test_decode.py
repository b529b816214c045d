"""Decoding against a plain PyAV reading, against frames that carry their own number, and on broken files."""

from __future__ import annotations

import pickle
import subprocess
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import av
import decord
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig
from framestream.pipeline.media import video as sources
from framestream.pipeline.media.decode import MediaError, VideoRequest, decode_video, encode_image, read_image
from framestream.pipeline.media.sampling import sample_indices
from framestream.pipeline.media.video import InexactSeekError, open_sequential, open_video
from tests.helpers.media.footage import BIKES, all_frames, number_of, write_video

FRAMES = FramesConfig(sampler="dynamic_fps1", min=4, max=64, size=64)
SIXTEEN = FramesConfig(sampler="middle", min=16, max=16, size=64)

ENCODINGS = {
    "h264.mp4": ("libx264", {"g": "12", "bf": "2"}),
    "h264_open.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "h264_open.ts": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "hevc.mkv": ("libx265", {"x265-params": "keyint=12:log-level=none"}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "cpu-used": "8", "deadline": "realtime"}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, options) in ENCODINGS.items():
        write_video(folder / name, 100, codec, options)
    return folder


@pytest.mark.parametrize("reader", ["decord", "av"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_every_frame_is_the_one_asked_for(videos: Path, name: str, reader: str) -> None:
    decoded = decode_video(videos / name, VideoRequest(reader, SIXTEEN))
    assert (decoded.vlen, decoded.fps, decoded.duration) == (100, 25.0, 4.0)
    assert (type(decoded.vlen), type(decoded.fps), type(decoded.duration)) == (int, float, float)  # JSON takes no numpy
    assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()
    assert decoded.frame_index.tolist() == sample_indices(SIXTEEN, 100, 25.0, 4.0).tolist()
    np.testing.assert_allclose(np.diff(decoded.timestamps), np.diff(decoded.frame_index) / 25, atol=2e-3)
    assert not decoded.salvaged


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoded_frames_are_those_of_the_array_one_at_a_time(videos: Path, name: str) -> None:
    """Also in formats that are read in order, where the frames that will be wanted are stored."""
    plain, alive = decode_video(videos / name, VideoRequest("decord", SIXTEEN)), []

    def encode(frame: np.ndarray) -> bytes:
        alive.append(weakref.ref(frame))
        assert sum(one() is not None for one in alive) <= 2
        return frame.tobytes()

    decoded = decode_video(videos / name, VideoRequest("decord", SIXTEEN), encode)
    assert decoded.encoded == [frame.tobytes() for frame in plain.frames] and not len(decoded.frames)
    assert (decoded.height, decoded.width) == plain.frames.shape[1:3] == (plain.height, plain.width)
    assert decoded.frame_index.tolist() == plain.frame_index.tolist() and plain.encoded == []


@pytest.mark.parametrize("name", ENCODINGS)
def test_seeking_gives_what_straight_reading_gives(videos: Path, name: str) -> None:
    straight = open_sequential(videos / name)
    try:
        source = open_video(videos / name)
        np.testing.assert_allclose(source.seconds, straight.seconds, atol=1e-9)
        for seed in range(8):
            rng = np.random.default_rng(seed)
            wanted = np.sort(rng.permutation(100)[: rng.integers(1, 20)])
            assert [number_of(np.asarray(frame)) for frame in source.decode_frames(wanted)] == wanted.tolist()
    except InexactSeekError:
        assert not name.startswith("h264.")  # the plain case is read by seeking
    assert [number_of(np.asarray(frame)) for frame in straight.decode_frames(np.arange(100))] == list(range(100))


def test_frames_are_those_that_decord_reads_straight_through(videos: Path) -> None:
    """decord as an independent reader: without seeking or skipping it is exact."""
    reader = decord.VideoReader(str(BIKES), num_threads=1)
    pixels = [reader.next().asnumpy() for _ in range(250)]
    decoded = decode_video(BIKES, VideoRequest("decord", SIXTEEN, 2.0, 9.0))
    for frame, index in zip(decoded.frames, decoded.frame_index + 50, strict=True):
        expected = Image.fromarray(pixels[index]).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.abs(frame - np.asarray(expected).astype(int)).max() <= 1


def test_pixels_are_those_of_a_plain_reading_and_pillow() -> None:
    pixels, seconds = all_frames(BIKES)
    for reader in ("decord", "av"):
        decoded = decode_video(BIKES, VideoRequest(reader, FRAMES))
        expected = sample_indices(FRAMES, 250, 25.0, 10.0)
        assert decoded.frame_index[decoded.sample].tolist() == expected.tolist()
        for frame, second, index in zip(decoded.frames, decoded.timestamps, decoded.frame_index, strict=True):
            resized = Image.fromarray(pixels[index]).resize((64, 64), Image.Resampling.BICUBIC)
            off = np.abs(frame - np.asarray(resized).astype(int))
            assert (off == 0).mean() > 0.98 and off.max() <= 1
            assert abs(second - seconds[index]) < 1e-6
        assert (decoded.source_width, decoded.source_height) == (640, 272)


def test_pixels_agree_with_the_ffmpeg_program() -> None:
    frames = FramesConfig(sampler="middle", min=4, max=4, size=64)
    decoded = decode_video(BIKES, VideoRequest("decord", frames))
    choice = "+".join(f"eq(n\\,{index})" for index in decoded.frame_index)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(BIKES), "-vf", f"select={choice}"]
    command += ["-fps_mode", "vfr", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = np.frombuffer(subprocess.run(command, check=True, capture_output=True).stdout, np.uint8)
    for frame, full in zip(decoded.frames, raw.reshape(4, 272, 640, 3), strict=True):
        expected = np.asarray(Image.fromarray(full).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(frame - expected).mean() < 1.5  # converters differ in how they upsample color


@pytest.mark.parametrize("reader", ["decord", "av"])
def test_a_clip_is_sampled_within_its_seconds(videos: Path, reader: str) -> None:
    decoded = decode_video(videos / "h264.mp4", VideoRequest(reader, SIXTEEN, 1.0, 3.0))
    assert (decoded.vlen, decoded.duration) == (51, 2.0)  # frames 25 to 75, both ends included
    assert decoded.frame_index.tolist() == sample_indices(SIXTEEN, 51, 25.0, 2.0).tolist()
    assert [number_of(frame) for frame in decoded.frames] == (decoded.frame_index + 25).tolist()
    np.testing.assert_allclose(decoded.timestamps, (decoded.frame_index + 25) / 25, atol=1e-6)


def test_times_of_a_variable_rate_are_the_source_times(tmp_path: Path) -> None:
    seconds = np.cumsum([0.0, *np.random.default_rng(0).uniform(0.02, 0.3, 59)])
    path = write_video(tmp_path / "vfr.mp4", 60, seconds=seconds.tolist())
    for reader in ("decord", "av"):
        decoded = decode_video(path, VideoRequest(reader, SIXTEEN, 2.0, 6.0))
        inside = np.flatnonzero((seconds >= 2.0) & (seconds <= 6.0))
        inside = np.array([inside[0] - 1, *inside])  # the frame on the screen at 2.0 s
        assert decoded.vlen == len(inside)
        shown = np.array([number_of(frame) for frame in decoded.frames])
        np.testing.assert_array_equal(shown, inside[decoded.frame_index])
        np.testing.assert_allclose(decoded.timestamps, seconds[shown], atol=1e-4)


def test_a_clip_may_overshoot_the_video_and_repeat_frames(videos: Path) -> None:
    decoded = decode_video(videos / "h264.mp4", VideoRequest("decord", FRAMES, 3.9, 99.0))
    assert (decoded.vlen, decoded.duration) == (3, pytest.approx(0.1))  # one is on the screen at 3.9 s
    assert decoded.sample.tolist() == [0, 1, 2, 2] and len(decoded.frames) == 3


def test_a_cut_with_an_edit_list_hides_its_first_frames(videos: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-ss", "1.2", "-i", str(videos / "h264.mp4")]
    subprocess.run([*command, "-c", "copy", str(cut)], check=True)
    decoded = decode_video(cut, VideoRequest("decord", SIXTEEN))
    shown = np.array([number_of(frame) for frame in decoded.frames])
    np.testing.assert_array_equal(shown, decoded.frame_index + 30)  # frame 30 is at 1.2 s
    assert decoded.vlen == 70 and not decoded.salvaged


def test_a_turned_video_is_read_upright_by_both(tmp_path: Path) -> None:
    turned = tmp_path / "turned.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(BIKES)]
    subprocess.run([*command, "-t", "2", "-c", "copy", str(turned)], check=True)
    one, other = (decode_video(turned, VideoRequest(reader, FRAMES)) for reader in ("decord", "av"))
    assert (one.source_width, one.source_height) == (other.source_width, other.source_height) == (272, 640)
    np.testing.assert_array_equal(one.frames, other.frames)


def test_rand_depends_on_the_seed_alone(videos: Path) -> None:
    frames = FramesConfig(sampler="rand", min=8, max=8, size=32)
    first, again, other = (decode_video(videos / "h264.mp4", VideoRequest("decord", frames, seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.frame_index.tolist() != other.frame_index.tolist()


def test_fps_sampling_is_padded_to_whole_clips(videos: Path) -> None:
    frames = FramesConfig(sampler="fps1.5", min=4, max=64, size=32)
    decoded = decode_video(videos / "h264.mp4", VideoRequest("decord", frames))
    assert len(decoded.sample) == 8 and len(decoded.frames) == 6
    assert decoded.sample.tolist() == [0, 1, 2, 3, 4, 5, 5, 5]


# Damaged and hostile files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    whole = BIKES.read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "page.mp4").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    (folder / "text.mp4").write_text("no video at all " * 100)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    index = whole.index(b"moov") + 4
    (folder / "damaged.mp4").write_bytes(whole[:index] + b"\xff" * (len(whole) - index))
    (folder / "image.mp4").write_bytes(_image_bytes("PNG"))
    (folder / "folder.mp4").mkdir()
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile {BIKES}\n")
    (folder / "hls.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{BIKES}\n#EXT-X-ENDLIST\n")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=d=1"]
    subprocess.run([*command, str(folder / "sound.mp4")], check=True)
    return folder


@pytest.mark.parametrize("reader", ["decord", "av"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.mp4", "missing_file"),
        ("nul\0.mp4", "missing_file"),
        ("empty.mp4", "empty_file"),
        ("page.mp4", "not_media"),
        ("text.mp4", "not_media"),
        ("folder.mp4", "not_media"),
        ("cut.mp4", "truncated"),
        ("damaged.mp4", "corrupt"),
        ("sound.mp4", "no_video_stream"),
        ("image.mp4", "unsupported"),
        ("list.mp4", "unsupported"),
        ("hls.m3u8", "unsupported"),
    ],
)
def test_broken_files_say_why(broken: Path, name: str, reason: str, reader: str) -> None:
    with pytest.raises(MediaError) as caught:
        decode_video(f"{broken}/{name}", VideoRequest(reader, FRAMES))
    assert caught.value.reason == reason
    assert name.partition("\0")[0] in str(caught.value) and "\n" not in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))  # workers of the build hand errors over like this
    assert (copy.reason, str(copy)) == (caught.value.reason, str(caught.value))


def test_fewer_frames_than_promised_are_counted_or_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "fast.mp4", 200, options={"g": "10", "movflags": "+faststart"})
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-c", "copy", "-movflags", "+faststart"]
        + [str(tmp_path / "front.mp4")],
        check=True,
    )
    whole = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "most.mp4").write_bytes(whole[: -len(whole) // 5])
    decoded = decode_video(tmp_path / "most.mp4", VideoRequest("decord", SIXTEEN))
    assert decoded.salvaged and 100 < decoded.vlen < 200
    assert decoded.duration == decoded.vlen / 25
    assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()

    index = whole.index(b"mdat")
    (tmp_path / "little.mp4").write_bytes(whole[: index + (len(whole) - index) // 5])
    with pytest.raises(MediaError, match="only [0-9]+ frames before that; 64 are needed") as caught:
        decode_video(
            tmp_path / "little.mp4", VideoRequest("decord", FramesConfig(sampler="middle", min=64, max=64, size=64))
        )
    assert caught.value.reason == "too_few_frames"


def test_a_matroska_file_that_ends_early_is_marked(videos: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "whole.mkv", 250, options={"g": "10"})
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "early.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    assert not decode_video(tmp_path / "whole.mkv", VideoRequest("decord", SIXTEEN)).salvaged
    assert decode_video(tmp_path / "early.mkv", VideoRequest("decord", SIXTEEN)).salvaged


@pytest.mark.parametrize("clip", [(3.0, 2.0), (2.0, 2.0), (50.0, 60.0), (-3.0, -1.0)])
def test_clips_without_frames_are_refused(videos: Path, clip: tuple[float, float]) -> None:
    with pytest.raises(MediaError) as caught:
        decode_video(videos / "h264.mp4", VideoRequest("decord", FRAMES, *clip))
    assert caught.value.reason == "bad_clip"


@pytest.mark.parametrize("second", [float("nan"), float("inf"), -float("inf"), "2", True])
def test_bounds_that_are_no_seconds_are_refused(videos: Path, second: object) -> None:
    """As files that are asked about without a build, and under ``compat: published``."""
    for name, clip in (("start", (second, None)), ("start", (second, 9.0)), ("end", (0.0, second))):
        for compat in ("none", "published"):
            request = VideoRequest("decord", FRAMES, *clip, compat=compat)
            with pytest.raises(
                MediaError, match=f"{name} is .*; it must be a number of seconds, such as 2.5$"
            ) as caught:
                decode_video(videos / "h264.mp4", request)
            assert caught.value.reason == "bad_clip"


# GIFs, folders and images --------------------------------------------------------------------------------------------


def _image_bytes(kind: str, size: tuple[int, int] = (40, 24), **options: object) -> bytes:
    import io

    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


def _gif(path: Path, colors: list[str], **options: object) -> Path:
    frames = [Image.new("RGB", (20, 10), color) for color in colors]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0, **options)
    return path


def test_a_gif_counts_one_frame_a_second_and_repeats_its_last(tmp_path: Path) -> None:
    path = _gif(tmp_path / "x.gif", ["red", "lime", "blue"])
    decoded = decode_video(path, VideoRequest("gif", FramesConfig(sampler="middle", min=8, max=8, size=16)))
    assert (decoded.vlen, decoded.fps, decoded.duration) == (3, 1.0, 3.0)
    assert decoded.sample.tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert decoded.timestamps.tolist() == [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(decoded.frames[:, 8, 8], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])


def test_transparent_places_of_a_gif_are_black(tmp_path: Path) -> None:
    frame = Image.new("P", (16, 16), 0)
    frame.putpalette([200, 200, 200, 255, 0, 0])
    frame.paste(1, (0, 0, 8, 16))
    frame.save(tmp_path / "t.gif", transparency=0)
    decoded = decode_video(
        tmp_path / "t.gif", VideoRequest("gif", FramesConfig(sampler="middle", min=4, max=4, size=16))
    )
    assert decoded.frames[0, 8, 3].tolist() == [255, 0, 0] and decoded.frames[0, 8, 12].tolist() == [0, 0, 0]


def test_broken_gifs_say_why(tmp_path: Path, broken: Path) -> None:
    whole = _gif(tmp_path / "x.gif", ["red", "lime"]).read_bytes()
    (tmp_path / "head.gif").write_bytes(whole[:12])
    for path, reason in (
        (tmp_path / "head.gif", "corrupt"),
        (broken / "page.mp4", "not_media"),
        (broken / "empty.mp4", "empty_file"),
    ):
        with pytest.raises(MediaError) as caught:
            decode_video(path, VideoRequest("gif", FRAMES))
        assert caught.value.reason == reason


@pytest.mark.parametrize("pattern", ["{:05d}.jpg", "show_{}.png", "a7_frame{}.JPEG"])
def test_frame_folders_are_in_order_of_the_last_number(tmp_path: Path, pattern: str) -> None:
    for number in range(12):
        Image.new("RGB", (8, 8), (number * 20,) * 3).save(tmp_path / pattern.format(number))
    (tmp_path / "notes.txt").write_text("not a frame")
    decoded = decode_video(
        tmp_path, VideoRequest("img", FramesConfig(sampler="middle", min=4, max=4, size=16), 3.0, 8.0)
    )
    assert (decoded.vlen, decoded.fps, decoded.duration) == (6, 1.0, 5.0)
    expected = sample_indices(FramesConfig(sampler="middle", min=4, max=4, size=16), 6, 1.0, 5.0) + 3
    assert decoded.timestamps.tolist() == expected.tolist()
    assert np.abs(decoded.frames[:, 8, 8, 0] - expected * 20.0).max() <= 2


def test_tvqa_folders_have_three_frames_a_second(tmp_path: Path) -> None:
    folder = tmp_path / "tvqa" / "s01"
    folder.mkdir(parents=True)
    for number in range(30):
        Image.new("RGB", (8, 8)).save(folder / f"{number:05d}.jpg")
    decoded = decode_video(folder, VideoRequest("frame", FRAMES))
    assert (decoded.vlen, decoded.fps, decoded.duration, len(decoded.sample)) == (30, 3.0, 10.0, 8)
    elsewhere = folder.rename(tmp_path / "frames")
    named = decode_video(elsewhere, VideoRequest("img", FRAMES, name="https://a.org/tvqa/s01"))
    assert (named.vlen, named.fps, named.timestamps.tolist()) == (30, 3.0, decoded.timestamps.tolist())
    assert decode_video(elsewhere, VideoRequest("img", FRAMES, name="https://a.org/s01")).fps == 1.0


def test_broken_folders_say_why(tmp_path: Path) -> None:
    with pytest.raises(MediaError) as caught:
        decode_video(tmp_path / "absent", VideoRequest("img", FRAMES))
    assert caught.value.reason == "missing_file"
    with pytest.raises(MediaError) as caught:
        decode_video(tmp_path, VideoRequest("img", FRAMES))
    assert caught.value.reason == "empty_file"
    (tmp_path / "0.jpg").write_bytes(_image_bytes("JPEG")[:400])
    with pytest.raises(MediaError) as caught:
        decode_video(tmp_path, VideoRequest("img", FRAMES))
    assert caught.value.reason == "truncated"


def test_plain_jpegs_are_kept_byte_for_byte(tmp_path: Path) -> None:
    for name, options in (("a.jpg", {}), ("progressive.jpg", {"progressive": True})):
        data = _image_bytes("JPEG", **options)
        (tmp_path / name).write_bytes(data)
        assert encode_image(tmp_path / name, ImagesConfig()) == (data, 40, 24, 40, 24)


def test_other_stills_are_encoded_upright_and_bounded(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (tmp_path / "turned.jpg").write_bytes(_image_bytes("JPEG", (400, 240), exif=exif, quality=95))
    (tmp_path / "wide.png").write_bytes(_image_bytes("PNG", (400, 240)))
    Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    for name, limit, sizes in (
        ("turned.jpg", 4096, (240, 400, 240, 400)),
        ("wide.png", 100, (100, 60, 400, 240)),
        ("print.jpg", 4096, (30, 20, 30, 20)),
    ):
        data, *found = encode_image(tmp_path / name, ImagesConfig(max_side=limit))
        assert tuple(found) == sizes
        (tmp_path / "out.jpg").write_bytes(data)
        with Image.open(tmp_path / "out.jpg") as stored:
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", sizes[:2])
    assert read_image(tmp_path / "out.jpg").getpixel((5, 5))[0] > 200  # CMYK red stays red


def test_broken_stills_say_why(tmp_path: Path, broken: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(_image_bytes("JPEG")[:500])
    (tmp_path / "figure.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    bomb = bytearray(_image_bytes("PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = __import__("zlib").crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(bomb))
    for path, reason in (
        (tmp_path / "absent.png", "missing_file"),
        (tmp_path / "cut.jpg", "truncated"),
        (tmp_path / "figure.jpg", "not_media"),
        (tmp_path / "bomb.png", "unsupported"),
        (broken / "page.mp4", "not_media"),
        (broken / "empty.mp4", "empty_file"),
    ):
        for read in (read_image, lambda item: encode_image(item, ImagesConfig())):
            with pytest.raises(MediaError) as caught:
                read(path)
            assert caught.value.reason == reason, path


# How much is decoded and held -----------------------------------------------------------------------------------------


@pytest.fixture
def decoded_frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames came out of each run of the decoder."""
    counts: list[int] = []

    def counting(*arguments: object, **named: object) -> Iterator[av.VideoFrame]:
        counts.append(0)
        run = len(counts) - 1
        for frame in original(*arguments, **named):
            counts[run] += 1
            yield frame

    original = sources.decode_stream
    monkeypatch.setattr(sources, "decode_stream", counting)
    return counts


def test_few_frames_are_reached_by_seeking_many_by_decoding_on(videos: Path, decoded_frames: list[int]) -> None:
    few = FramesConfig(sampler="middle", min=4, max=4, size=32)
    for name in ("h264.mp4", "hevc.mkv", "vp9.webm", "h264_open.ts"):
        decoded_frames.clear()
        decode_video(videos / name, VideoRequest("decord", few))
        assert sum(decoded_frames) < 50, name
        decoded_frames.clear()
        decode_video(videos / name, VideoRequest("decord", FramesConfig(sampler="middle", min=64, max=64, size=32)))
        assert sum(decoded_frames) <= 101, name


def test_a_file_without_times_is_decoded_once(tmp_path: Path, decoded_frames: list[int]) -> None:
    path = write_video(tmp_path / "bare.h264", 100, options={"g": "12", "bf": "2"})
    decoded = decode_video(path, VideoRequest("decord", SIXTEEN, 1.0, 3.0))
    assert decoded_frames == [100] and not decoded.salvaged
    assert [number_of(frame) for frame in decoded.frames] == (decoded.frame_index + 25).tolist()


def test_a_long_video_costs_a_few_bytes_a_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "once.mp4", 250, options={"g": "250", "bf": "2"})
    with av.open(str(tmp_path / "once.mp4")) as once, av.open(str(tmp_path / "long.mkv"), "w") as long:
        stream = once.streams.video[0]
        target, length = long.add_stream_from_template(stream), round(10 / stream.time_base)
        packets = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in once.demux(stream) if p.dts is not None]
        for turn in range(40):
            for data, pts, dts, key in packets:
                packet = av.Packet(data)
                packet.pts, packet.dts, packet.time_base = pts + turn * length, dts + turn * length, stream.time_base
                packet.stream, packet.is_keyframe = target, key
                long.mux(packet)
    for read in (open_video, open_sequential):
        tracemalloc.start()
        source = read(tmp_path / "long.mkv")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(source.seconds) == 10_000 and peak < 10_000 * 80
    wanted = np.array([7, 4_999, 9_990])
    frames = open_video(tmp_path / "long.mkv").decode_frames(wanted)
    assert [number_of(frame) for frame in frames] == (wanted % 250).tolist()


def test_streams_that_only_strict_decoders_refuse_are_read(tmp_path: Path) -> None:
    """The header says four reference frames, the stream uses five: some cameras write such files."""
    options = {"g": "25", "bf": "0", "refs": "5", "profile": "main", "preset": "slow"}
    data = bytearray(write_video(tmp_path / "refs.mp4", 100, options=options).read_bytes())
    place = data.index(b"avcC") + 4 + 8 + 4  # past the lengths, and profile and level of its parameter set
    bits = "".join(f"{byte:08b}" for byte in data[place : place + 8])
    assert bits.startswith("1101100110")  # 0, 0, 2 and 5 in Exp-Golomb: ITU-T H.264, sections 7.3.2.1.1, 9.1
    bits = bits[:5] + "00101" + bits[10:]
    data[place : place + 8] = int(bits, 2).to_bytes(8, "big")
    path = tmp_path / "refs.mp4"
    path.write_bytes(data)
    pixels, _ = all_frames(path)
    decoded = decode_video(path, VideoRequest("decord", SIXTEEN))
    assert (decoded.vlen, decoded.salvaged) == (100, False)
    for frame, index in zip(decoded.frames, decoded.frame_index, strict=True):
        assert number_of(frame) == number_of(pixels[index])


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "size"), [("short_side", (150, 64)), ("long_side", (64, 28)), ("stretch", (64, 64))])
def test_frames_keep_their_aspect_where_asked(mode: str, size: tuple[int, int]) -> None:
    frames = FramesConfig(sampler="middle", min=4, max=4, size=64, resize=mode)
    decoded = decode_video(BIKES, VideoRequest("decord", frames))
    assert decoded.frames.shape[1:3] == size[::-1] and (decoded.source_width, decoded.source_height) == (640, 272)
    pixels, _ = all_frames(BIKES)
    for frame, index in zip(decoded.frames, decoded.frame_index, strict=True):
        expected = Image.fromarray(pixels[index]).resize(size, Image.Resampling.BICUBIC)
        assert np.abs(frame - np.asarray(expected).astype(int)).max() <= 1


def test_a_strip_too_narrow_to_keep_its_aspect_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    Image.new("RGB", (1000, 10)).save(tmp_path / "f" / "1.png")
    frames = FramesConfig(sampler="middle", min=4, max=4, size=64, resize="short_side")
    with pytest.raises(MediaError, match="too narrow") as caught:
        decode_video(tmp_path / "f", VideoRequest("img", frames))
    assert caught.value.reason == "unsupported"
