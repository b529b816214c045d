"""What was encoded is not encoded again, and comes out as if it had been."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.trainer.inference.vision_cache import VisionFeatureCache

CPU = torch.device("cpu")


class Counting:
    """A stand-in for a tower: every unit's tokens are its own pixels, and every unit is counted."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, clips: torch.Tensor, stills: torch.Tensor) -> torch.Tensor:
        self.seen += [int(unit.flatten()[0]) for unit in (*clips, *stills)]
        return torch.cat([units.flatten(1)[:, :1].float().repeat(1, 8).view(-1, 2, 4) for units in (clips, stills)])


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
        found = encoded(units(clips, 4, 2, 2, 3), units(stills, 2, 2, 3))
        assert found.shape == (len(clips) + len(stills), 2, 4)
        np.testing.assert_array_equal(found[:, 0, 0].numpy(), [*clips, *stills])


def test_nothing_is_encoded_twice_while_there_is_room():
    counting = Counting()
    encoded = VisionFeatureCache(counting, CPU, max_bytes=2 * 32)
    for numbers in ([1, 2], [2, 1], [1, 3], [1, 2]):  # 3 displaces 2, which was not asked for lately
        encoded(units(numbers, 4, 2, 2, 3), units([], 2, 2, 3))
    assert counting.seen == [1, 2, 3, 2]


def test_pixels_are_compared_on_the_host_and_only_new_ones_copied():
    seen = []

    def encode(clips, tiles):
        seen.append((clips.device.type, tiles.device.type, len(clips), len(tiles)))
        return torch.zeros(len(clips) + len(tiles), 64, 2, device=clips.device)

    cache = VisionFeatureCache(encode, torch.device("meta"))
    clips, tiles = torch.arange(2 * 4 * 12).view(2, 4, 2, 2, 3).byte(), torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    for shown in (clips, clips[:1], clips + 1):
        assert cache(shown, tiles).device.type == "meta"
    assert seen == [("meta", "meta", 2, 1), ("meta", "meta", 2, 0)]
