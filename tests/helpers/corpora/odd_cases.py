"""Over a hundred broken and unusual inputs in a local folder, each with the expected result of a build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.media.footage import BIKES, all_frames, number_of
from tests.helpers.media.odd_media import (
    Maker,
    animated_webp,
    copy_of,
    cover_before_video,
    cut,
    damaged,
    damaged_packet,
    deep_png,
    faststart,
    folder,
    folder_with,
    frame_folder,
    gif,
    grows,
    holding,
    in_format,
    numbered_video,
    odd_gif,
    patched,
    picture_bytes,
    pipe,
    png_bomb,
    remuxed,
    same_as,
    sound_with_cover,
    turned_jpeg,
    two_videos,
    wave,
)

#: Of the manifest that builds them; the checks know it.
FRAMES = {"sampler": "middle", "min": 4, "max": 16, "size": 128, "quality": 95, "subsampling": "444"}
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nplain.mp4\n#EXT-X-ENDLIST\n"
PAGE = "<!DOCTYPE html><html><body>404 Not Found</body></html>"
IRREGULAR = np.cumsum([0.0, *np.random.default_rng(0).uniform(0.02, 0.3, 59)]).tolist()
LONG_NAME = "n" * 251 + ".mp4"


@dataclass(frozen=True)
class Shown:
    """The result of a build for one case."""

    source: Path
    frames: list[np.ndarray]  #: stored pictures, uint8 (H, W, 3), read by Pillow at the places that the index names
    row: dict  #: of the index
    facts: dict  #: KEY.json
    data: bytes  #: of the member


@dataclass(frozen=True)
class Case:
    """An input and its expected result: a reason, or a check of the stored media."""

    make: Maker | None
    name: str  #: below the place
    expected: str | Callable[[Shown], None]
    fields: dict = field(default_factory=dict)  #: of the sample
    kind: str = "video"


def numbers(
    vlen: int | range, first: int = 0, seconds: Sequence[float] | None = None, shift: float = 0, salvaged: bool = False
) -> Callable[[Shown], None]:
    """Return a check of a numbered video: frames ``first`` and later, each at its own time within half a frame."""

    def look(shown: Shown) -> None:
        found = [number_of(frame) for frame in shown.frames]
        assert found == (np.array(shown.row["frame_index"]) + first).tolist()
        assert len(found) == min(shown.row["vlen"], 16)
        assert shown.row["vlen"] in (vlen if isinstance(vlen, range) else (vlen,))
        expected = np.array(found) / 25 if seconds is None else np.array(seconds)[found]
        np.testing.assert_allclose(shown.row["timestamps"], expected + shift, atol=0.02)
        assert len(shown.row["sample"]) == 16 and shown.facts["salvaged"] == salvaged

    return look


def every_second(count: int, first: int = 0) -> Callable[[Shown], None]:
    """Return a check of a folder of numbered images."""
    return numbers(count, first=first, seconds=range(100))


def picture(shown: Shown) -> None:
    """Check an image against Pillow."""
    with Image.open(shown.source) as source:
        upright = ImageOps.exif_transpose(source).convert("RGB")
    assert shown.frames[0].shape[:2] == upright.size[::-1]
    assert np.abs(shown.frames[0] - np.asarray(upright).astype(int)).mean() < 6


def kept(shown: Shown) -> None:
    """Check an image that is stored unchanged."""
    assert shown.data == shown.source.read_bytes()


def deep(shown: Shown) -> None:
    """Check a 16-bit image."""
    expected = np.asarray(Image.fromarray(corpus.picture(1, 40, 30)).convert("L")).astype(int)[..., None]
    assert np.abs(shown.frames[0] - expected).mean() < 2


def first_of_webp(shown: Shown) -> None:
    """Check an animation that is named as an image."""
    assert np.abs(shown.frames[0] - corpus.picture(1, 40, 30).astype(int)).mean() < 3


def flat(*colours: tuple[int, int, int]) -> Callable[[Shown], None]:
    """Return a check of frames of one color each."""

    def look(shown: Shown) -> None:
        means = [frame.mean(axis=(0, 1)) for frame in shown.frames]
        np.testing.assert_allclose(means, colours, atol=4)

    return look


def square_on_red(shown: Shown) -> None:
    """Check ``odd_gif``: a blue square stays on the red canvas under transparent pixels."""
    assert shown.row["vlen"] == 4 and shown.row["source_width"] == 40 and shown.row["source_height"] == 20
    for number, frame in enumerate(shown.frames):
        assert np.abs(frame[100:, 100:].mean(axis=(0, 1)) - (255, 0, 0)).max() < 4
        inside = frame[44:70, 40:50].mean(axis=(0, 1))
        assert np.abs(inside - ((0, 0, 255) if number else (255, 0, 0))).max() < 12


def footage(salvaged: bool, vlen: range) -> Callable[[Shown], None]:
    """Return a check of real footage against ffmpeg's frames of the complete file."""

    def look(shown: Shown) -> None:
        pixels, seconds = all_frames(BIKES)
        assert shown.row["vlen"] in vlen and shown.facts["salvaged"] == salvaged
        for frame, index, second in zip(shown.frames, shown.row["frame_index"], shown.row["timestamps"], strict=True):
            expected = np.asarray(Image.fromarray(pixels[index]).resize((128, 128), Image.Resampling.BICUBIC))
            assert np.abs(frame - expected.astype(int)).mean() < 4 and abs(second - seconds[index]) < 0.02

    return look


PLAIN = numbered_video()
TURNS_OF = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}  #: display matrices, clockwise
MIRRORS = {"left": (-1, 0, 0, 1), "upside": (1, 0, 0, -1), "both": (0, 1, 1, 0), "other": (0, -1, -1, 0)}
IMG = {"video_read_type": "img"}
GIF = {"video_read_type": "gif"}


def video(make: Maker | None, name: str, expected: str | Callable[[Shown], None], **fields: object) -> Case:
    return Case(make, name, expected, fields)


def still(make: Maker | None, name: str, expected: str | Callable[[Shown], None], **fields: object) -> Case:
    return Case(make, name, expected, fields, "image")


LOCAL = {
    # videos of every shape
    "plain": video(PLAIN, "plain.mp4", numbers(100)),
    "faststart": video(faststart(PLAIN), "front.mp4", numbers(100)),
    "matroska": video(PLAIN, "plain.mkv", numbers(100)),
    "webm": video(numbered_video(codec="libvpx-vp9", options={"g": "12", "cpu-used": "8"}), "vp9.webm", numbers(100)),
    "vp8": video(numbered_video(codec="libvpx", options={"g": "30", "cpu-used": "8"}), "vp8.webm", numbers(100)),
    "avi": video(numbered_video(codec="mpeg4", options={"g": "12"}), "plain.avi", numbers(100)),
    "avi-b-frames": video(numbered_video(codec="mpeg4"), "b.avi", numbers(100, shift=0.04)),
    "flv": video(PLAIN, "plain.flv", numbers(100)),
    "transport-stream": video(PLAIN, "plain.ts", numbers(100)),
    "fragmented": video(remuxed(PLAIN, "-movflags", "+frag_keyframe+empty_moov"), "fragments.mp4", numbers(100)),
    "hevc": video(numbered_video(codec="libx265", options={"x265-params": "log-level=0"}), "x265.mp4", numbers(100)),
    "open-groups": video(
        numbered_video(options={"g": "12", "bf": "3", "x264-params": "open-gop=1"}), "open.mkv", numbers(100)
    ),
    "one-group": video(numbered_video(options={"g": "250"}), "long.mp4", numbers(100)),
    "intra-only": video(numbered_video(codec="mjpeg", pix_fmt="yuvj420p", options={}), "all.avi", numbers(100)),
    "one-frame": video(numbered_video(1), "1.mp4", numbers(1)),
    "two-frames": video(numbered_video(2), "2.mp4", numbers(2)),
    "variable-rate": video(numbered_video(60, seconds=IRREGULAR), "vfr.mp4", numbers(60, seconds=IRREGULAR)),
    "edit-list": video(remuxed(PLAIN, before=("-ss", "1.2")), "cut.mp4", numbers(70, first=30, shift=-1.2)),
    "4:4:4": video(numbered_video(pix_fmt="yuv444p"), "444.mp4", numbers(100)),
    "10-bit": video(numbered_video(pix_fmt="yuv420p10le"), "10.mp4", numbers(100)),
    "hdr": video(
        numbered_video(pix_fmt="yuv420p10le", tags={"color_trc": 16, "color_primaries": 9, "colorspace": 9}),
        "hdr.mp4",
        numbers(100),
    ),
    "full-range": video(numbered_video(pix_fmt="yuvj420p"), "full.mp4", numbers(100)),
    "grey": video(numbered_video(pix_fmt="gray"), "grey.mp4", numbers(100)),
    "lossless": video(numbered_video(codec="ffv1", options={}), "ffv1.mkv", numbers(100)),
    "odd-sides": video(numbered_video(pix_fmt="yuv444p", size=(67, 35)), "odd.mp4", numbers(100)),
    "interlaced": video(
        numbered_video(codec="mpeg2video", options={"flags": "+ildct+ilme", "g": "12", "bf": "2"}),
        "fields.ts",
        numbers(100),
    ),
    "grows": video(grows, "grows.h264", numbers(100)),
    "two-videos": video(two_videos, "two.mkv", numbers(100)),
    "cover-and-video": video(cover_before_video, "cover.mp4", numbers(50)),
    **{
        f"turned-{name}": video(numbered_video(matrix=matrix), f"turned-{name}.mp4", numbers(100))
        for name, matrix in (TURNS_OF | MIRRORS).items()
    },
    "footage": video(copy_of(BIKES), "bikes.mp4", footage(False, range(250, 251))),
    # names that say something else
    "mp4-as-avi": video(numbered_video(container="mp4"), "is-mp4.avi", numbers(100)),
    "mkv-as-mp4": video(numbered_video(container="matroska"), "is-mkv.mp4", numbers(100)),
    "mp4-without-name": video(numbered_video(container="mp4"), "noextension", numbers(100)),
    "gif-as-mp4": video(gif, "is-gif.mp4", flat((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))),
    "jpeg-as-mp4": video(holding(picture_bytes("JPEG")), "is-jpeg.mp4", "unsupported"),
    "mp4-as-gif": video(numbered_video(container="mp4"), "is-mp4.gif", "not_media", **GIF),
    "mp4-as-jpg": still(numbered_video(container="mp4"), "is-mp4.jpg", "not_media"),
    "webp-as-jpg": still(in_format("WEBP", lossless=True), "is-webp.jpg", picture),
    "png-as-jpg": still(in_format("PNG"), "is-png.jpg", picture),
    # no video, or hardly
    "missing": video(None, "missing.mp4", "missing_file"),
    "empty": video(holding(""), "empty.mp4", "empty_file"),
    "one-byte": video(holding("x"), "byte.mp4", "not_media"),
    "page": video(holding(PAGE), "page.mp4", "not_media"),
    "text": video(holding("no video at all " * 100), "text.mp4", "not_media"),
    "noise": video(holding(np.random.default_rng(0).bytes(50_000)), "noise.mp4", "not_media"),
    "sound": video(corpus.sound, "sound.mp4", "no_video_stream"),
    "sound-with-cover": video(sound_with_cover, "cover.m4a", "no_video_stream"),
    "wave": video(wave, "sound.wav", "unsupported"),
    "playlist": video(
        holding(PLAYLIST),
        "list.m3u8",
        "unsupported",
    ),
    "script": video(holding("ffconcat version 1.0\nfile plain.mp4\n"), "script.mp4", "unsupported"),
    "folder-as-video": video(folder, "folder.mp4", "not_media"),
    "unknown-codec": video(patched(PLAIN, b"stsd", 12, b"zzzz"), "codec.mp4", "unsupported"),
    "huge-sides": video(
        patched(numbered_video(codec="rawvideo", options={}), b"strf", 8, (12_000).to_bytes(4, "little") * 2),
        "huge.avi",
        "unsupported",
    ),
    # cut off
    "cut-before-index": video(cut(PLAIN, 0.5), "cut.moov.mp4", "truncated"),
    "cut-in-header": video(cut(PLAIN, 0.003), "cut.head.mp4", "truncated"),
    "cut-in-index": video(cut(faststart(PLAIN), 0.1), "cut.index.mp4", "truncated"),
    "cut-after-index": video(cut(faststart(PLAIN), 0.05, b"mdat"), "cut.early.mp4", "truncated"),
    "cut-half": video(cut(faststart(PLAIN), 0.6, b"mdat"), "cut.half.mp4", numbers(range(20, 90), salvaged=True)),
    "cut-late": video(cut(faststart(PLAIN), 0.95, b"mdat"), "cut.late.mp4", numbers(range(80, 100), salvaged=True)),
    "cut-footage": video(cut(faststart(copy_of(BIKES)), 0.5), "cut.bikes.mp4", footage(True, range(40, 200))),
    "cut-matroska": video(cut(PLAIN, 0.6), "cut.mkv", numbers(range(20, 90), salvaged=True)),
    "cut-webm": video(cut(numbered_video(codec="libvpx-vp9"), 0.6), "cut.webm", numbers(range(20, 90), salvaged=True)),
    "cut-avi": video(
        cut(numbered_video(codec="mpeg4", options={"g": "12"}), 0.7), "cut.avi", numbers(range(10, 99), salvaged=True)
    ),
    "cut-transport-stream": video(cut(PLAIN, 0.6), "cut.ts", numbers(range(40, 90))),
    "cut-fragments": video(
        cut(remuxed(PLAIN, "-movflags", "+frag_keyframe+empty_moov"), 0.6),
        "cut.fragments.mp4",
        numbers(range(20, 90), salvaged=True),
    ),
    # damaged within
    "damaged-middle": video(damaged(PLAIN, 0.4, after=b"mdat"), "hurt.mp4", numbers(range(20, 99), salvaged=True)),
    "damaged-footage": video(damaged(copy_of(BIKES), 0.5, 2000), "hurt.bikes.mp4", footage(True, range(60, 180))),
    "damaged-matroska": video(damaged(PLAIN, 0.6, 3), "hurt.mkv", numbers(range(20, 99), salvaged=True)),
    "damaged-transport-stream": video(damaged(PLAIN, 0.35, 200), "hurt.ts", numbers(range(20, 70), salvaged=True)),
    "damaged-at-once": video(
        damaged_packet(PLAIN, 0), "hurt.first.mp4", numbers(range(80, 90), first=12, salvaged=True)
    ),
    "damaged-early": video(damaged_packet(numbered_video(options={"bf": "0"}), 3), "hurt.early.mp4", "too_few_frames"),
    "damaged-group": video(damaged_packet(PLAIN, 36), "hurt.group.mp4", numbers(range(30, 37), salvaged=True)),
    "damaged-index": video(damaged(PLAIN, 0.1, 400, b"moov"), "hurt.index.mp4", "no_video_stream"),
    "damaged-matroska-header": video(damaged(PLAIN, 0.0, 60), "hurt.head.mkv", "not_media"),
    # clips
    "clip": video(None, "plain.mp4", numbers(51, first=25), start=1.0, end=3.0),
    "clip-of-text": video(None, "plain.mp4", numbers(26, first=50), start="2", end="3.0"),
    "clip-of-two-frames": video(None, "plain.mp4", numbers(2, first=49), start=1.99, end=2.01),
    "clip-from-before": video(None, "plain.mp4", "bad_clip", start=-3, end=1.0),
    "clip-beyond-the-end": video(None, "plain.mp4", numbers(25, first=75), start=3.0, end=99),
    "clip-without-end": video(None, "plain.mp4", numbers(50, first=50), start=2.0),
    "clip-variable-rate": video(
        None,
        "vfr.mp4",
        numbers(
            sum(2 <= second <= 6 for second in IRREGULAR) + 1,  # and the one on the screen at 2 s
            first=sum(second < 2 for second in IRREGULAR) - 1,
            seconds=IRREGULAR,
        ),
        start=2.0,
        end=6.0,
    ),
    "clip-of-open-groups": video(None, "open.mkv", numbers(51, first=20), start=0.8, end=2.8),
    "clip-between-frames": video(None, "plain.mp4", numbers(1, first=25), start=1.005, end=1.015),
    "clip-after-the-end": video(None, "plain.mp4", "bad_clip", start=50, end=60),
    "clip-backwards": video(None, "plain.mp4", "bad_clip", start=3, end=2),
    "clip-empty": video(None, "plain.mp4", "bad_clip", start=2, end=2),
    "clip-nan": video(None, "plain.mp4", "bad_clip", start="nan", end=2),
    "clip-word": video(None, "plain.mp4", "bad_clip", start="soon", end=2),
    "clip-before-damage": video(None, "cut.half.mp4", numbers(26), start=0.0, end=1.0),
    "clip-into-damage": video(
        None, "cut.half.mp4", numbers(range(4, 65), first=20, salvaged=True), start=0.8, end=99.0
    ),
    "clip-after-damage": video(None, "cut.half.mp4", "truncated", start=3.7, end=3.9),
    # GIFs
    "gif": video(gif, "plain.gif", flat((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)), **GIF),
    "gif-sizes": video(odd_gif, "sizes.gif", square_on_red, **GIF),
    "gif-one": video(in_format("GIF"), "one.gif", lambda shown: None, **GIF),
    "gif-head": video(cut(gif, 0.03), "head.gif", "corrupt", **GIF),
    "gif-page": video(holding(PAGE), "page.gif", "not_media", **GIF),
    "gif-huge": video(patched(gif, b"GIF89a", 0, b"\xff\xff\xff\xff"), "huge.gif", "unsupported", **GIF),
    # folders of frames
    "folder": video(frame_folder([f"{k:05d}.jpg" for k in range(1, 21)]), "f-plain", every_second(20), **IMG),
    "folder-with-gaps": video(
        frame_folder([f"{k:05d}.jpg" for k in (1, 2, 7, 100, 101, 99_999)]), "f-gaps", every_second(6), **IMG
    ),
    "folder-unpadded": video(
        frame_folder([f"img_{k}.PNG" for k in range(9, 13)]), "f-unpadded", every_second(4), **IMG
    ),
    "folder-of-sizes": video(
        frame_folder([f"{k}.png" for k in range(6)], [(64, 32), (128, 64), (40, 20)]),
        "f-sizes",
        every_second(6),
        video_read_type="frame",
    ),
    "folder-clip": video(None, "f-plain", every_second(4, first=3), start=3, end=6.5, **IMG),
    "folder-clip-outside": video(None, "f-plain", "bad_clip", start=30, end=40, **IMG),
    "folder-empty": video(folder, "f-empty", "empty_file", **IMG),
    "folder-of-text": video(folder_with("notes.txt", holding("no")), "f-text", every_second(4), **IMG),
    "folder-with-page": video(folder_with("2.jpg", holding(PAGE)), "f-page", "not_media", **IMG),
    "folder-with-cut": video(folder_with("2.jpg", cut(in_format("JPEG"), 0.5)), "f-cut", "truncated", **IMG),
    "folder-with-pipe": video(folder_with("2.jpg", pipe), "f-pipe", "not_media", **IMG),
    "folder-with-folder": video(folder_with("5.jpg", folder), "f-folder", every_second(4), **IMG),
    "folder-is-file": video(None, "plain.mp4", "not_media", **IMG),
    "folder-missing": video(None, "f-missing", "missing_file", **IMG),
    # stills
    "jpeg": still(in_format("JPEG"), "plain.jpg", kept),
    "progressive": still(in_format("JPEG", progressive=True), "progressive.jpg", kept),
    "grey-jpeg": still(in_format("JPEG", "L"), "grey.jpg", kept),
    "cmyk": still(in_format("JPEG", "CMYK"), "print.jpg", picture),
    "exif": still(turned_jpeg, "turned.jpg", picture),
    "png": still(in_format("PNG"), "plain.png", picture),
    "png-alpha": still(in_format("PNG", "RGBA"), "alpha.png", picture),
    "png-palette": still(in_format("PNG", "P"), "palette.png", picture),
    "png-bits": still(in_format("PNG", "1"), "bits.png", picture),
    "png-16-bit": still(deep_png, "deep.png", deep),
    "one-pixel": still(in_format("PNG", size=(1, 1)), "pixel.png", picture),
    "very-wide": still(in_format("PNG", size=(3000, 2)), "wide.png", picture),
    "webp-animated": still(animated_webp, "animated.webp", first_of_webp),
    "gif-still": still(gif, "still.gif", flat((255, 0, 0))),
    "tiff": still(in_format("TIFF"), "plain.tiff", picture),
    "bmp": still(in_format("BMP"), "plain.bmp", picture),
    "still-cut": still(cut(in_format("JPEG"), 0.5), "cut.jpg", "truncated"),
    "png-cut": still(cut(in_format("PNG"), 0.5), "cut.png", "truncated"),
    "still-page": still(holding(PAGE), "page.jpg", "not_media"),
    "still-empty": still(holding(""), "empty.jpg", "empty_file"),
    "still-missing": still(None, "missing.jpg", "missing_file"),
    "postscript": still(holding("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "eps.jpg", "not_media"),
    "svg": still(holding('<svg xmlns="http://www.w3.org/2000/svg"/>'), "drawing.png", "not_media"),
    "bomb": still(png_bomb, "bomb.png", "unsupported"),
    "damaged-png": still(damaged(in_format("PNG"), 0.5, 30), "hurt.png", "corrupt"),
    # places
    "link": video(same_as("plain.mp4"), "inner.mp4", numbers(100)),
    "link-to-nothing": video(same_as("nothing.mp4"), "dangling.mp4", "missing_file"),
    "link-to-itself": video(same_as("loop.mp4"), "loop.mp4", "missing_file"),
    "link-outside": video(same_as("../secret/secret.mp4"), "outside.mp4", "outside_root"),
    "link-outside-still": still(same_as("../secret/secret.jpg"), "outside.jpg", "outside_root"),
    "link-folder-outside": video(same_as("../secret"), "outside-folder", "outside_root", **IMG),
    "link-in-folder": video(folder_with("2.jpg", same_as("../../secret/secret.jpg")), "f-link", "outside_root", **IMG),
    "link-to-device": video(same_as("/dev/zero"), "zero.mp4", "outside_root"),
    "climbs": video(None, "../secret/secret.mp4", "outside_root"),
    "absolute": video(None, "/etc/hostname", "outside_root"),
    "pipe": video(pipe, "pipe.mp4", "not_media"),
    "pipe-as-still": still(pipe, "pipe.jpg", "not_media"),
    "pipe-as-gif": video(pipe, "pipe.gif", "not_media", **GIF),
    "pipe-as-folder": video(pipe, "f-fifo", "not_media", **IMG),
    "folder-as-still": still(folder, "folder.jpg", "not_media"),
    "name-longest": video(PLAIN, LONG_NAME, numbers(100)),
    "name-too-long": video(None, "n" + LONG_NAME, "missing_file"),
    "name-unicode": video(PLAIN, "fil\u00e9 \u4e2d\u6587 \U0001f600.mp4", numbers(100)),
    "name-like-an-address": video(PLAIN, "100% of it?#a=b&c.mp4", numbers(100)),
    "name-with-newline": video(PLAIN, "two\nlines.mp4", numbers(100)),
    "name-like-an-option": video(PLAIN, "-i.mp4", numbers(100)),
    "name-with-protocol": video(PLAIN, "concat:plain.mp4|plain.mp4", numbers(100)),
    "name-with-nul": video(None, "nul\0.mp4", "bad_media"),
    "name-that-is-no-text": video(None, "\udcff.mp4", "bad_sample"),
    "name-empty": video(None, ".", "outside_root"),
}
