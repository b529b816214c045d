"""Pixels that arrive in pieces: the tokens of one call, and none that were encoded before."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.evaluation.pixel_stream import CHUNK_CLIPS, stream_pixels
from framestream.pipeline.shards.media_view import MediaView
from framestream.trainer.inference.vision_cache import VisionFeatureCache
from framestream.trainer.inference.vision_stream import StreamEncoder
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, small_model

CPU = torch.device("cpu")


class Counting:
    """A stand-in for a tower: every unit's tokens are its own pixels, and every unit is counted."""

    patches, group_limit = 1, 9

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, clips: torch.Tensor, stills: torch.Tensor) -> torch.Tensor:
        self.calls.append((clips.device.type, len(clips), len(stills)))
        self.seen += [int(unit.flatten()[0]) for unit in (*clips.cpu(), *stills.cpu())]
        return torch.cat([units.flatten(1)[:, :1].float().repeat(1, 8).view(-1, 2, 4) for units in (clips, stills)])


class Grey:
    """A stand-in for stored media: frame k of every video is of one grey."""

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        shown = view.frame_indices[start : start + len(out)]
        assert (np.diff(shown) >= 0).all()  # as the reader of shards requires
        out[:] = (shown % 251).astype(np.uint8)[:, None, None, None]

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        out[:] = np.arange(200, 200 + len(out), dtype=np.uint8)[:, None, None, None]


def view(kind: str, count: int) -> MediaView:
    indices = np.arange(count if kind == "video" else 0)
    return MediaView(0, kind, indices, "", len(indices) // 4, count if kind == "image" else 0)


def units(numbers: list[int], *shape: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8).view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()


rows = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=5), st.lists(st.integers(20, 25), max_size=3)).filter(any),
    min_size=1,
    max_size=6,
)


@given(rows, st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_tokens_are_those_of_the_units_whatever_is_kept(asked, kept):
    counting = Counting()
    encoded = VisionFeatureCache(counting, CPU, max_bytes=kept * 32)
    for clips, stills in asked:
        found = encoded([(units(clips, 4, 2, 2, 3), units(stills, 2, 2, 3))])
        assert found.shape == (len(clips) + len(stills), 2, 4)
        np.testing.assert_array_equal(found[:, 0, 0].numpy(), [*clips, *stills])


def test_nothing_is_encoded_twice_while_there_is_room():
    counting = Counting()
    encoded = VisionFeatureCache(counting, CPU, max_bytes=2 * 32)
    for numbers in ([1, 2], [2, 1], [1, 3], [1, 2]):  # 3 displaces 2, which was not asked for lately
        encoded([(units(numbers, 4, 2, 2, 3), units([], 2, 2, 3))])
    assert counting.seen == [1, 2, 3, 2]


def test_pixels_are_compared_on_the_host_and_only_new_ones_copied():
    seen = []

    class Meta(Counting):
        def __call__(self, clips, tiles):
            seen.append((clips.device.type, tiles.device.type, len(clips), len(tiles)))
            return torch.zeros(len(clips) + len(tiles), 64, 2, device=clips.device)

    cache = VisionFeatureCache(Meta(), torch.device("meta"))
    clips, tiles = torch.arange(2 * 4 * 12).view(2, 4, 2, 2, 3).byte(), torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    for shown in (clips, clips[:1], clips + 1):
        assert cache([(shown, tiles)]).device.type == "meta"
    assert seen == [("meta", "meta", 2, 1), ("meta", "meta", 2, 0)]


@pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])
@pytest.mark.parametrize("make", [StreamEncoder, VisionFeatureCache])
def test_a_stream_has_the_tokens_of_one_call_bit_for_bit(cfg, make):
    tower = small_model(cfg=cfg).vision_tower.eval()
    pixels = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (7, 4, SIZE, SIZE, 3), dtype=torch.uint8, generator=pixels)
    tiles = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8, generator=pixels)
    pieces = [(clips[:3], tiles[:0]), (clips[3:4], tiles[:0]), (clips[4:], tiles[:1]), (clips[:0], tiles[1:])]
    with torch.no_grad():
        expected = tower(clips, tiles)
    assert torch.equal(make(tower, CPU)(pieces), expected)


@pytest.mark.parametrize("shuffled", [False, True])
def test_pixels_arrive_in_order_a_few_clips_at_a_time(shuffled):
    frames, config = 4 * (2 * CHUNK_CLIPS + 3), FramesConfig(sampler="middle", min=4, max=400, size=16)
    shown = [view("image", 2), view("video", frames), view("video", 8)]
    rng = np.random.default_rng(5) if shuffled else None
    pieces = list(stream_pixels(Grey(), shown, config, rng))
    assert max(len(clips) for clips, _ in pieces) == CHUNK_CLIPS
    grey = [int(frame[0, 0, 0]) for clips, _ in pieces for frame in clips.flatten(0, 1)]
    again = np.random.default_rng(5)
    wanted = [again.permutation(n) if shuffled else np.arange(n) for n in (frames, 8)]
    assert grey == (np.concatenate(wanted) % 251).tolist()
    assert [int(tile[0, 0, 0]) for _, tiles in pieces for tile in tiles] == [200, 201]
    assert [len(tiles) > 0 for _, tiles in pieces] == [False] * 4 + [True]  # tiles come last


def test_memory_grows_by_tokens_and_not_by_frames():
    """The pixels alive at 2,048 frames are those at 256."""
    config, peaks = FramesConfig(sampler="middle", min=4, max=4096, size=64), []
    for frames in (256, 2048):
        counting = Counting()
        tracemalloc.start()
        tokens = StreamEncoder(counting, CPU)(stream_pixels(Grey(), [view("video", frames)], config))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(tokens) == frames // 4 == len(counting.seen)
    frame_bytes = 64 * 64 * 3
    assert peaks[0] > 64 * frame_bytes  # the pixels of a piece are counted
    assert peaks[1] - peaks[0] < 32 * frame_bytes
