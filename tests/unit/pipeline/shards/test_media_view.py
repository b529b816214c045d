"""Views of stored media: the frames they select, and their pixels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline.config.preprocessing import SAMPLERS, FramesConfig
from framestream.pipeline.media.sampling import pad_to_clips, sample_indices
from framestream.pipeline.media.tiling import split_into_tiles
from framestream.pipeline.shards.index import MEDIA_SCHEMA, Index, build_table
from framestream.pipeline.shards.media_view import MediaViews, nearest_indices
from tests.helpers.corpora.small_root import SIZE, Root, colour, manifest


@given(st.sets(st.integers(0, 500), min_size=1, max_size=40), st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_nearest_is_nearest(stored, wanted):
    stored = np.array(sorted(stored))
    got = nearest_indices(stored, np.array(wanted))
    for number, position in zip(wanted, got.tolist(), strict=True):
        assert abs(stored[position] - number) == min(abs(s - number) for s in stored.tolist())


@given(
    st.sampled_from([*SAMPLERS, "fps1", "fps0.5"]),
    st.integers(1, 2000),
    st.floats(1, 60),
    st.integers(1, 16),
    st.integers(0, 5),
)
def test_settings_of_the_build_show_the_frames_of_the_build(sampler, vlen, fps, clips, seed):
    frames = manifest(Path("."), frames={"sampler": sampler, "min": 4, "max": 4 * clips, "size": SIZE}).frames
    wanted = pad_to_clips(sample_indices(frames, vlen, fps, vlen / fps, np.random.default_rng(seed)), vlen, 4)
    stored, sample = np.unique(wanted, return_inverse=True)
    assert nearest_indices(stored, wanted).tolist() == sample.tolist()


def one_video(frames: FramesConfig, vlen: int, fps: float) -> Index:
    """An index in memory of one video, as a build with ``frames`` makes it."""
    wanted = pad_to_clips(sample_indices(frames, vlen, fps, vlen / fps), vlen, frames.clip_frames)
    stored, sample = np.unique(wanted, return_inverse=True)
    row = {field.name: None for field in MEDIA_SCHEMA} | {"key": "v0", "kind": "video", "vlen": vlen, "fps": fps}
    row |= {"duration": vlen / fps, "sample": sample, "frame_index": stored, "timestamps": stored / fps}
    return Index(Path("."), build_table(MEDIA_SCHEMA, [row]), None, None, "", {}, {})


@given(
    built=st.sampled_from(["middle", "dynamic_fps1", "fps1", "fps0.5"]),
    read=st.sampled_from(["middle", "dynamic_fps1", "fps1", "fps2"]),
    vlen=st.integers(1, 4000),
    fps=st.floats(1, 60),
    bounds=st.lists(st.integers(1, 128), min_size=4, max_size=4),
)
def test_any_number_of_frames_is_had_of_what_is_stored(built, read, vlen, fps, bounds):
    """4 to 512 of a video: the build's own, or the nearest; the error has a bound, and times are true."""
    pairs = [sorted(4 * clips for clips in pair) for pair in (bounds[:2], bounds[2:])]
    made, shown = (
        manifest(Path("."), frames={"sampler": sampler, "min": low, "max": high, "size": SIZE, "time_message": "long"})
        for sampler, (low, high) in zip((built, read), pairs, strict=True)
    )
    index = one_video(made.frames, vlen, fps)
    stored = np.array(index.media["frame_index"][0].as_py())
    for under in (made, shown):
        wanted = pad_to_clips(sample_indices(under.frames, vlen, fps, vlen / fps), vlen, 4)
        (view,) = MediaViews(index, under).views([0])
        frames = stored[view.frame_indices]
        assert len(frames) == len(wanted) == 4 * view.clips and len(frames) <= 512
        error = np.abs(frames - wanted)
        outside = np.maximum(stored[0] - wanted, wanted - stored[-1])
        assert (error <= np.maximum(np.diff(stored).max(initial=0) / 2, outside)).all()
        if under is made or (read, pairs[1]) == (built, pairs[0]):
            assert not error.any()
        seconds = ", ".join(str(float(np.around(number / fps, 1))) for number in frames)
        assert view.message.endswith(f"{len(frames)} frames are uniformly sampled at {seconds} seconds. ")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = Root(tmp_path_factory.mktemp("media_views"))
    for vlen, stored in ((90, 90), (90, 12), (3, 3)):
        made.video(vlen, stored)
    made.still(150, 60)
    made.still(50, 50)
    return made.write()


def media_views(root, **over) -> MediaViews:
    made = manifest(root, **over)
    return MediaViews(Index.open(made.shard_root), made)


def shown(reader: MediaViews, row: int) -> np.ndarray:
    view = reader.views([row])[0]
    out = np.empty((len(view.frame_indices), reader.frames.size, reader.frames.size, 3), dtype=np.uint8)
    reader.read_frames(view, 0, out)
    return out


@pytest.mark.parametrize("maximum", [4, 8, 64])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_frames_are_the_nearest_stored_ones(root, row, maximum):
    reader = media_views(root, frames__max=maximum, frames__min=maximum)
    vlen = reader.index.media["vlen"][row].as_py()
    stored = reader.index.media["frame_index"][row].as_py()
    wanted = sample_indices(reader.frames, vlen, 2.0, vlen / 2.0)
    pixels = shown(reader, row)
    assert len(pixels) == maximum
    for frame, number in zip(pixels, wanted.tolist(), strict=True):
        best = min(stored, key=lambda s: (abs(s - number), s))
        assert np.abs(frame.reshape(-1, 3) - np.array(colour(row, best))).max() <= 3
        assert abs(best - number) <= -(-max(np.diff(stored)) // 2)


def test_parts_of_a_video_are_parts_of_all_frames(root):
    reader = media_views(root, frames__max=16)
    view = reader.views([0])[0]
    whole = shown(reader, 0)
    part = np.empty((5, SIZE, SIZE, 3), dtype=np.uint8)
    reader.read_frames(view, 7, part)
    assert np.array_equal(part, whole[7:12])


def test_the_message_names_the_frames_that_are_shown(root):
    view = media_views(root, frames__time_message="long").views([1])[0]
    index = Index.open(root / "stage2").media["frame_index"][1].as_py()
    seconds = ", ".join(str(float(np.around(index[position] / 2.0, 1))) for position in view.frame_indices)
    assert view.message == (
        f"\nThe video lasts for 45.00 seconds, and 8 frames are uniformly sampled at {seconds} seconds. "
    )
    assert media_views(root, frames__time_message="none").views([1])[0].message == ""


def test_another_size_is_resized_as_pil_does_within_a_level(root):
    small, same = media_views(root, frames__size=32, model__vision_tower__patch=4), media_views(root)
    for got, stored in zip(shown(small, 1), shown(same, 1), strict=True):
        expected = np.asarray(Image.fromarray(stored).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("mode", ["square", "anyres_nopad"])
def test_images_are_the_tiles_of_the_stored_image(root, mode):
    reader = media_views(root, images__mode=mode)
    media = reader.index.media
    for rows in ([3], [3, 4]):
        for view in reader.views(rows):
            out = np.empty((view.tiles, SIZE, SIZE, 3), dtype=np.uint8)
            reader.read_image(view, out)
            with tarfile.open(reader.index.shard_path(media["shard"][view.row].as_py())) as tar:
                data = tar.extractfile(f"{media['key'][view.row].as_py()}.jpg").read()
            expected, grid = split_into_tiles(Image.open(io.BytesIO(data)), mode, SIZE, 2, several=len(rows) > 1)
            assert view.grid == grid and view.tiles == len(expected)
            assert np.abs(out.astype(int) - expected).max() <= 2  # two JPEG decoders


def test_rand_is_the_same_at_every_reading(root):
    first, second = (media_views(root, frames__sampler="rand").views([0])[0].frame_indices.tolist() for _ in range(2))
    other = media_views(root, frames__sampler="rand", seed=1).views([0])[0].frame_indices.tolist()
    assert first == second != other


def test_a_shard_that_ends_early_is_an_error(tmp_path):
    made = Root(tmp_path)
    made.video(8, 8)
    reader = media_views(made.write())
    path = reader.index.shard_path(0)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match="the shard ends within"):
        shown(reader, 0)


def test_more_shards_than_open_files(root, monkeypatch):
    monkeypatch.setattr("framestream.pipeline.storage.local.OPEN_FILES", 1)
    reader = media_views(root)
    expected = [shown(media_views(root), row) for row in (0, 1)]
    for _ in range(3):
        assert all(np.array_equal(shown(reader, row), expected[row]) for row in (0, 1))
    assert len(reader.index.storage._open) == 1
