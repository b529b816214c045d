"""Files as other programs write them: times, held frames, palettes, transparency, depth, and what they really are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.config.data import DECODERS
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig
from framestream.pipeline.media import image as images
from framestream.pipeline.media import video
from framestream.pipeline.media.decode import Decoded, MediaError, VideoRequest, decode_video, encode_image, read_image
from framestream.pipeline.media.decoders.base import DecoderConfig
from tests.helpers.media.footage import number_of, numbered, write_video

FOUR = FramesConfig(sampler="middle", min=4, max=4, size=64)
MANY = FramesConfig(sampler="middle", min=4, max=64, size=64)
B_FRAMES = {"g": "12", "bf": "2"}


def _ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def _clip(path: Path, start: float, end: float) -> Decoded:
    return decode_video(path, VideoRequest("decord", MANY, start, end))


@pytest.mark.parametrize(("start", "end", "shown"), [(10, 19, [0]), (10, 21, [0, 1, 2]), (20, 21, [1, 2])])
def test_the_frame_on_the_screen_belongs_to_the_clip(tmp_path: Path, start: int, end: int, shown: list[int]) -> None:
    path = write_video(tmp_path / "slides.mp4", 4, seconds=[0, 20, 20.04, 40])
    decoded = _clip(path, start, end)
    assert [number_of(frame) for frame in decoded.frames] == shown
    assert (decoded.start, decoded.duration) == (start, end - start)
    np.testing.assert_allclose(decoded.timestamps, np.array([0, 20, 20.04, 40])[shown], atol=1e-3)


def test_the_last_frame_is_held_while_sound_goes_on(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", 1, fps=1)
    sound = ["-f", "lavfi", "-i", "sine=d=30", "-c:v", "copy"]
    _ffmpeg("-i", tmp_path / "one.mp4", *sound, tmp_path / "held.mp4")
    decoded = _clip(tmp_path / "held.mp4", 10, 20)
    assert (decoded.vlen, decoded.duration) == (1, 10.0)
    with pytest.raises(MediaError, match="no frames from 40 s") as caught:
        _clip(tmp_path / "held.mp4", 40, 50)
    assert caught.value.reason == "bad_clip"


def test_avi_without_presentation_times_has_its_own_rate(tmp_path: Path) -> None:
    write_video(tmp_path / "plain.mp4", 100, options=B_FRAMES)
    _ffmpeg("-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "copied.avi")
    whole = decode_video(tmp_path / "copied.avi", VideoRequest("decord", MANY))
    assert (whole.vlen, whole.fps, whole.duration) == (100, pytest.approx(25), pytest.approx(4.0))
    assert [number_of(frame) for frame in whole.frames] == whole.frame_index.tolist()
    clip = _clip(tmp_path / "copied.avi", 1, 2)
    assert number_of(clip.frames[0]) == 25 and clip.vlen == 26


def test_a_frame_before_the_start_of_the_container_is_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "plain.ts", 50, "mpeg2video", B_FRAMES)
    scan = video.scan_packets

    def late_start(file: Path) -> video._Scan:
        import dataclasses

        result = scan(file)
        return dataclasses.replace(result, origin=result.origin + 0.08)

    monkeypatch.setattr(video, "scan_packets", late_start)
    decoded = decode_video(path, VideoRequest("decord", FOUR))
    assert video.open_sequential(path).seconds[0] == 0.0
    np.testing.assert_allclose(decoded.timestamps, decoded.frame_index / 25, atol=1e-3)


def test_a_palette_of_the_first_packet_is_not_lost(tmp_path: Path) -> None:
    for number in range(40):
        Image.fromarray(numbered(number)).convert("L").save(tmp_path / f"{number}.png")
    frames = tmp_path / "%d.png"
    _ffmpeg("-i", frames, "-vf", "format=pal8,format=pal8", "-c:v", "rawvideo", tmp_path / "pal.avi")
    with av.open(str(tmp_path / "pal.avi")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "pal8"
    decoded = decode_video(tmp_path / "pal.avi", VideoRequest("decord", FOUR))
    assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()


def test_a_failing_seek_reads_straight_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "plain.mp4", 100, options=B_FRAMES)
    expected = decode_video(path, VideoRequest("decord", FOUR))

    class Refusing:
        def seek(self, *arguments: object, **named: object) -> None:
            raise av.PermissionError(1, "Operation not permitted", "")

    seek = video._seek
    monkeypatch.setattr(video, "_seek", lambda container, stream, time: seek(Refusing(), stream, time))
    decoded = decode_video(path, VideoRequest("decord", FOUR))
    np.testing.assert_array_equal(decoded.frames, expected.frames)


@pytest.mark.parametrize("error", [av.OSError(95, "Operation not supported", ""), ValueError("x"), MemoryError()])
def test_errors_of_the_converter_are_media_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = write_video(tmp_path / "plain.mp4", 30)

    def fail(frame: object) -> np.ndarray:
        raise error

    monkeypatch.setattr(video, "frame_pixels", fail)
    with pytest.raises(MediaError, match=r"plain\.mp4: ") as caught:
        decode_video(path, VideoRequest("decord", FOUR))
    assert caught.value.reason in ("corrupt", "unsupported")


def test_tags_that_are_not_utf8_do_not_matter(tmp_path: Path) -> None:
    write_video(tmp_path / "plain.mp4", 30)
    _ffmpeg("-i", tmp_path / "plain.mp4", "-c", "copy", "-metadata", "title=XXXX", tmp_path / "tagged.mkv")
    data = (tmp_path / "tagged.mkv").read_bytes()
    (tmp_path / "tagged.mkv").write_bytes(data.replace(b"XXXX", b"\xe9\xe8\xff\xe0"))
    for decoder in DECODERS:
        request = VideoRequest("decord", FOUR, decoding=DecoderConfig(decoder))
        assert decode_video(tmp_path / "tagged.mkv", request).vlen == 30


@pytest.mark.parametrize("name", ["a.mpg", "a.vob", "a.ts"])
def test_every_frame_of_a_stream_is_the_one_asked_for(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, 100, "mpeg2video" if name == "a.vob" else "mpeg1video", B_FRAMES)
    for number in (0, 40, 86, 87, 92, 99):
        seconds = number / 25 + 0.001
        decoded = decode_video(tmp_path / name, VideoRequest("decord", FOUR, seconds, seconds + 0.01))
        assert {number_of(frame) for frame in decoded.frames} == {number}


# What a file is -------------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
MPD = b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>'
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64


@pytest.mark.parametrize(
    ("data", "name", "step"),
    [
        (LFS, "Git LFS pointer", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.mp4\n", "git-annex pointer", "git annex get"),
        (MPD, "DASH manifest", "fetch the video itself"),
        (b"#EXTM3U\n#EXTINF:1,\na.ts\n", "HLS playlist", "fetch the video itself"),
        (b"\0\0\0\x18stypmsdh\0\0\0\0msdhmsix" + b"\0\0\0\x08mdat", "segment", "cat init.mp4"),
        (b"\x1f\x8b\x08\0" + b"x" * 40, "gzip", "decompress"),
        (b"PK\x03\x04" + b"x" * 40, "ZIP archive", "unpack"),
        (b"\xef\xbb\xbf\n<HTML><body>404", "HTML page", "real address"),
        (b'{"error": "denied"}', "JSON text", "real address"),
        (b"\0" * 5000, "zero bytes", "fetch the file again"),
        (HEIC, "HEIC photo", "convert it"),
        (b"../../../blobs/e0c1", "target of a link", "with its links"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path: Path, data: bytes, name: str, step: str) -> None:
    path = tmp_path / "wrong.bin"
    path.write_bytes(data)
    for read in (read_image, lambda file: decode_video(file, VideoRequest("decord", FOUR))):
        with pytest.raises(MediaError) as caught:
            read(path)
        assert name in str(caught.value) and step in str(caught.value)
        assert caught.value.reason in ("not_media", "unsupported")


# Images ---------------------------------------------------------------------------------------------------------------


def test_transparent_pixels_are_black_for_every_reader(tmp_path: Path) -> None:
    hidden = np.full((16, 16, 4), (255, 0, 254, 0), np.uint8)
    hidden[:, :8] = (200, 100, 0, 255)
    Image.fromarray(hidden).save(tmp_path / "hidden.png")
    Image.fromarray(hidden).save(tmp_path / "hidden.webp", lossless=True, exact=True)
    frame = Image.new("P", (16, 16), 0)
    frame.putpalette([255, 0, 254, 200, 100, 0])
    frame.paste(1, (0, 0, 8, 16))
    frame.save(tmp_path / "hidden.gif", transparency=0)
    one = FramesConfig(sampler="middle", min=4, max=4, size=16)
    shown = [np.asarray(read_image(tmp_path / f"hidden.{kind}")) for kind in ("png", "webp", "gif")]
    shown += [
        decode_video(tmp_path / "hidden.gif", VideoRequest(reader, one)).frames[0] for reader in ("gif", "decord")
    ]
    for pixels in shown:
        assert pixels[8, 3].tolist() == [200, 100, 0] and pixels[8, 12].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["uint16", "12 bits", "int32", "float32", "float of 1e6"])
def test_deep_images_keep_their_gradient(tmp_path: Path, kind: str) -> None:
    ramp = np.tile(np.linspace(0, 1, 64), (16, 1))
    values = {
        "uint16": (ramp * 65535).astype(np.uint16),
        "12 bits": (ramp * 4095).astype(np.uint16),
        "int32": (ramp * 1e9).astype(np.int32),
        "float32": ramp.astype(np.float32),
        "float of 1e6": (ramp * 1e6).astype(np.float32),
    }[kind]
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    row = np.asarray(read_image(tmp_path / "deep.tiff"))[8, :, 0].astype(int)
    assert row[0] == 0 and row[-1] == 255 and np.abs(row - ramp[0] * 255).max() <= 2


def test_values_at_one_end_are_refused_in_words(tmp_path: Path) -> None:
    values = np.zeros((64, 64), np.float32)
    values[0, 0] = 1e9
    Image.fromarray(values).save(tmp_path / "spike.tiff")
    with pytest.raises(MediaError, match="convert it to 8 bits"):
        read_image(tmp_path / "spike.tiff")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_reduced_while_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 400 * 300 - 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 300), (200, 30, 40)).save(tmp_path / "large", kind, exif=exif)
    data, *sizes = encode_image(tmp_path / "large", ImagesConfig(max_side=100))
    assert sizes == [75, 100, 300, 400]
    assert read_image(tmp_path / "large").size == (150, 200)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 1000)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match="400 x 300 pixels are too many; .* may have 1,000"):
        read_image(tmp_path / "large")


def test_a_jpeg_of_a_thousand_scans_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_SCANS", 400 * 300 * 3)
    Image.new("RGB", (400, 300)).save(tmp_path / "scans.jpg", progressive=True)
    with pytest.raises(MediaError, match="too many scans"):
        read_image(tmp_path / "scans.jpg")


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_joined_streams_are_read_to_their_end(tmp_path: Path, codec: str) -> None:
    """As ffmpeg reads them. The times begin again with the second stream, so the frames are spaced evenly."""
    once = write_video(tmp_path / "once.ts", 50, codec, B_FRAMES).read_bytes()
    (tmp_path / "twice.ts").write_bytes(once + once)
    decoded = decode_video(tmp_path / "twice.ts", VideoRequest("decord", MANY))
    assert (decoded.vlen, decoded.duration, decoded.damage) == (100, pytest.approx(4.0), "")
    assert [number_of(frame) for frame in decoded.frames] == [number % 50 for number in decoded.frame_index.tolist()]


def test_damage_is_told_with_its_second(tmp_path: Path) -> None:
    write_video(tmp_path / "whole.mp4", 100, options=B_FRAMES)
    _ffmpeg("-i", tmp_path / "whole.mp4", "-c", "copy", "-movflags", "+faststart", tmp_path / "front.mp4")
    data = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 3 // 5])
    decoded = decode_video(tmp_path / "cut.mp4", VideoRequest("decord", FOUR))
    end = decoded.vlen / 25
    assert decoded.damage == (
        f"the stream is damaged at {end:.2f} s; {decoded.vlen} frames before that were recovered, "
        f"{4 - end:.2f} s up to 4.00 s are missing"
    )
    data = write_video(tmp_path / "whole.ts", 100, options=B_FRAMES).read_bytes()
    gap = len(data) // 188 // 2 * 188
    (tmp_path / "gap.ts").write_bytes(data[:gap] + data[gap + 9 * 188 :])
    damage = decode_video(tmp_path / "gap.ts", VideoRequest("decord", FOUR)).damage
    assert "the stream is damaged at " in damage and damage.endswith(" s up to 4.00 s are missing")


def test_animations_of_images_are_videos_or_named(tmp_path: Path) -> None:
    pictures = [Image.fromarray(numbered(number)) for number in range(20)]
    for name in ("a.png", "a.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
    decoded = decode_video(tmp_path / "a.png", VideoRequest("decord", MANY))
    assert (decoded.vlen, decoded.fps, decoded.duration) == (20, 10.0, 2.0)
    assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()
    decoded = decode_video(tmp_path / "a.webp", VideoRequest("decord", MANY))
    assert (decoded.vlen, decoded.fps, decoded.duration) == (20, 10.0, 2.0)
    assert [number_of(frame) for frame in decoded.frames] == decoded.frame_index.tolist()
    pictures[0].save(tmp_path / "still.webp")
    with pytest.raises(MediaError, match="is a WebP image; give it as an image"):
        decode_video(tmp_path / "still.webp", VideoRequest("decord", MANY))
