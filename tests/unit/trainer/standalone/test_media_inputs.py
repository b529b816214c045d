"""Media of an export: the pixels, tokens and time messages that the chat of a run gives the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.decode import VideoRequest, decode_video
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from framestream.trainer.standalone.media_inputs import ModelMedia, load_image, load_video
from framestream.trainer.standalone.settings import FramesConfig, ImagesConfig
from tests.helpers.media.footage import BIKES, write_video
from tests.helpers.model.rows import SIZE
from tests.helpers.model.standalone_exports import chat_prompt, small_manifest


def as_chat(made: Manifest, *files: MediaFile) -> tuple[Batch, list[str]]:
    return chat_prompt(made, "", files)


def assert_like(found: np.ndarray, wanted: torch.Tensor) -> None:
    """Compare pixels with those of shards, whose JPEG encoder rounds in another way than Pillow's."""
    difference = np.abs(found.astype(int) - wanted.numpy())
    assert found.shape == tuple(wanted.shape) and difference.mean() < 2.5


def video(made: Manifest, path: object, fps: float = 1.0, clip: tuple = (), **changes: object) -> ModelMedia:
    return load_video(path, FramesConfig(**to_dict(made.frames) | changes), fps, *clip)


def image(made: Manifest, picture: object, several: bool = False) -> ModelMedia:
    return load_image(picture, ImagesConfig(**to_dict(made.images)), made.frames.size, several)


def gif(path: Path) -> Path:
    frames = [Image.new("P", (40, 30), color=20 * i) for i in range(9)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


@pytest.mark.parametrize(
    ("sampler", "resize", "style"),
    [("dynamic_fps1", "stretch", "short"), ("middle", "short_side", "long"), ("fps2", "long_side", "none")],
)
def test_a_film_is_seen_as_in_the_chat(sampler, resize, style):
    made = small_manifest(sampler=sampler, resize=resize, time_message=style)
    batch, (message,) = as_chat(made, MediaFile(BIKES))
    found = video(made, BIKES)
    assert_like(found.clips, batch.clips)
    assert len(found.clips) == 2
    assert found.message == message and len(found.order) == 128 and not len(found.tiles)


@pytest.mark.parametrize("name", ["film.mkv", "film.gif"])
def test_other_files_are_seen_as_in_the_chat(tmp_path, name):
    """After a seek this codec has no frames, and a GIF has one frame a second."""
    path = tmp_path / name
    if name == "film.gif":
        gif(path)
    else:
        write_video(path, 60, codec="snow")
    made = small_manifest()
    batch, (message,) = as_chat(made, MediaFile(path))
    found = video(made, str(path))
    assert_like(found.clips, batch.clips)
    assert found.message == message


@pytest.mark.parametrize("clip", [(2.5, 6.0), (None, 4), (7.2, None), (0, 99)])
def test_a_clip_is_seen_as_in_the_chat(clip):
    made = small_manifest(min=4, max=8)
    batch, (message,) = as_chat(made, MediaFile(BIKES, *clip))
    found = video(made, BIKES, clip=clip)
    assert_like(found.clips, batch.clips)
    assert found.message == message


def test_clips_that_are_not_there_are_refused():
    with pytest.raises(MediaError, match="no frames from 20 s to 30 s; the video ends at 10.00 s"):
        video(small_manifest(), BIKES, clip=(20, 30))
    with pytest.raises(ValueError, match="start and end need a video file"):
        video(small_manifest(), [np.zeros((8, 8, 3), np.uint8)], clip=(0, 1))


def test_published_frames_are_not_compressed():
    made = small_manifest()
    decoded = decode_video(BIKES, VideoRequest("decord", made.frames))
    found = video(made, BIKES, quality=None)
    assert np.array_equal(found.clips.reshape(-1, SIZE, SIZE, 3), decoded.frames[decoded.sample])
    assert not np.array_equal(found.clips, video(made, BIKES).clips)


def test_frames_are_a_video_of_their_own(tmp_path):
    made = small_manifest()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
    found = video(made, pixels, fps=2.0)
    assert found.message == "\nThe video lasts for 6.00 seconds, and 4 frames are uniformly sampled from it. "
    assert np.array_equal(video(made, [Image.fromarray(frame) for frame in pixels], fps=2.0).clips, found.clips)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    assert np.array_equal(video(made, [tmp_path / f"{i}.png" for i in range(12)], fps=2.0).clips, found.clips)


@pytest.mark.parametrize(
    ("name", "size", "mode"),
    [
        ("wide.png", (300, 140), "RGB"),
        ("gray.jpg", (90, 260), "L"),
        ("clear.png", (64, 64), "RGBA"),
        ("c.jpg", (99, 80), "CMYK"),
        ("turned.jpg", (200, 90), "RGB"),
    ],
)
def test_an_image_is_seen_as_in_the_chat(tmp_path, name, size, mode):
    noise = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    exif = picture.getexif()
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(noise[..., 0]))
    elif name == "turned.jpg":
        exif[0x0112] = 6
    picture.save(tmp_path / name, exif=exif)
    made, file = small_manifest(), MediaFile(tmp_path / name, reader=IMAGE_READER)
    batch, _ = as_chat(made, file)
    found = image(made, tmp_path / name)
    if name == "gray.jpg":  # stored as it is
        assert np.array_equal(found.tiles, batch.image_tiles.numpy())
    assert_like(found.tiles, batch.image_tiles)
    assert np.array_equal(found.order, batch.visual_index.numpy())
    both, _ = as_chat(made, file, file)
    assert_like(np.concatenate([image(made, str(tmp_path / name), True).tiles] * 2), both.image_tiles)


@pytest.mark.parametrize(
    ("film", "message"),
    [
        ("nowhere.mp4", "nowhere.mp4: cannot be opened"),
        ("text.mp4", "text.mp4: "),
        ([], "a video has no frames"),
        ([np.zeros((4, 4), np.uint8)], r"a frame is uint8 \(4, 4\); pass uint8 pixels"),
        (["text.mp4"], "text.mp4: cannot be read as an image"),
        ("cut.gif", "cut.gif: the GIF cannot be read"),
        (".", r"\.: is a folder; pass a list of the images in it, in their order"),
        ([Path()], r"\.: is a folder; pass the path of an image in it"),
        ("https://host/film.mp4?key=secret", r"^a video is an address \(https://...\), and addresses are refused;"),
        ("file:///film.mp4", r"^a video is an address \(file://"),
        (["DATA:image/png;base64,secret"], r"^an image is an address \(DATA:...\)"),
        (Image.new("RGB", (4, 4)), "^a video is a Image; pass a path, or a list of frames"),
        (b"film", "^a video is a bytes; pass a path"),
        (iter([]), "^a video is a list_iterator; pass a path"),
    ],
)
def test_media_that_cannot_be_used_are_one_line(tmp_path, monkeypatch, film, message):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video")
    Path("cut.gif").write_bytes(b"GIF89a")
    with pytest.raises((MediaError, ValueError), match=message) as error:
        video(small_manifest(), film)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), "2", True, [2]])
def test_a_rate_that_no_video_has_is_refused(fps):
    with pytest.raises(ValueError, match=r"^fps is .*; it must be a number above 0$"):
        video(small_manifest(), np.zeros((4, 8, 8, 3), np.uint8), fps=fps)


@pytest.mark.parametrize("second", ["2", "00:02", float("nan"), float("inf"), -float("inf"), True, [2]])
def test_bounds_that_are_no_seconds_are_refused(second):
    for clip, name in (((second, None), "start"), ((0, second), "end")):
        with pytest.raises(ValueError, match=f"^{name} is .*; it must be a number of seconds, such as 2.5$"):
            video(small_manifest(), BIKES, clip=clip)
