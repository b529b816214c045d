"""Frame sampling against the golden tables and against properties that the rules imply."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.config.preprocessing import SAMPLERS, FramesConfig
from framestream.pipeline.media.sampling import (
    check_count,
    frame_indices,
    media_seed,
    pad_to_clips,
    sample_indices,
    time_message,
)
from tests.helpers.golden_data import files, json_lines


def rows_by_sampler() -> dict[str, list[dict]]:
    rows = defaultdict(list)
    for row in json_lines("frame_indices/table.jsonl"):
        rows[row["sample"]].append(row)
    return rows


@pytest.mark.parametrize(("sampler", "rows"), rows_by_sampler().items())
def test_golden_frame_indices(sampler, rows):
    for row in rows:
        duration = row.get("duration", row["vlen"] / row["fps"])
        got = frame_indices(sampler, row["vlen"], row["fps"], duration, row["min"], row["max"], row["local"])
        assert got.dtype == np.int64
        assert got.tolist() == row["indices"], row
        assert len(got) == row["n"]


def messages(row: dict, indices: list[int]) -> None:
    for style in ("short", "long", "none"):
        if f"msg_{style}" in row:
            assert time_message(style, row["duration"], np.array(indices), row["fps"]) == row[f"msg_{style}"], row
        if f"msg_{style}_error" in row and "error" not in row:
            with pytest.raises(ValueError, match="frames.clip_frames"):
                check_count(len(row.get("frames_read", indices)), row["local"])


@pytest.mark.parametrize("path", files("frame_indices/*.jsonl"), ids=lambda path: path.stem)
def test_golden_time_messages(path):
    for row in json_lines(f"frame_indices/{path.name}"):
        if "asked" in row and "duration" not in row:
            row["duration"] = row["end"] - row["start"]
        indices = row.get("indices", row.get("nominal_indices"))
        if "duration" in row and indices is not None:
            messages(row, indices)


@pytest.mark.parametrize("path", files("frame_indices/decord.jsonl"), ids=lambda path: path.stem)
def test_golden_whole_videos(path):
    for row in json_lines(f"frame_indices/{path.name}"):
        if row["clip"] is None and "indices" in row:
            got = frame_indices(
                row["sample"], row["vlen"], row["fps"], row["duration"], row["min"], row["max"], row["local"]
            )
            assert got.tolist() == row["indices"], row


samplers = st.sampled_from([*SAMPLERS, "fps1", "fps0.5", "fps30"])


@given(samplers, st.integers(1, 3000), st.floats(0.2, 120), st.integers(1, 40), st.integers(1, 16), st.integers(0, 9))
def test_indices_are_ordered_in_range_and_fill_clips(sampler, vlen, fps, low, clips, seed):
    low = -(-low // 4) * 4 if sampler == "dynamic_fps1" else low
    frames = FramesConfig(sampler=sampler, min=min(low, 4 * clips), max=4 * clips, size=32)
    got = sample_indices(frames, vlen, fps, vlen / fps, np.random.default_rng(seed))
    fitted = pad_to_clips(got, vlen, 4)
    assert len(got) <= frames.max
    assert len(fitted) % 4 == 0 and 4 <= len(fitted) <= frames.max
    assert fitted[: len(got)].tolist() == got.tolist()
    assert fitted.min() >= 0 and fitted.max() < vlen
    assert (np.diff(fitted) >= 0).all()


@given(st.integers(8, 2000), st.integers(0, 2**32))
def test_rand_takes_one_frame_an_interval_and_obeys_its_seed(vlen, seed):
    frames = FramesConfig(sampler="rand", min=8, max=8, size=32)
    got = sample_indices(frames, vlen, 25, vlen / 25, np.random.default_rng(seed))
    edges = [int(i * vlen / 8) for i in range(9)]
    for index, start, stop in zip(got, edges, edges[1:], strict=False):
        assert start <= index < stop or abs(index - start) <= 1  # an edge may fall on either side of a float
    again = sample_indices(frames, vlen, 25, vlen / 25, np.random.default_rng(seed))
    assert again.tolist() == got.tolist()


def test_errors_name_the_reason():
    frames = FramesConfig(sampler="rand", min=4, max=8, size=32)
    with pytest.raises(ValueError, match="rng"):
        sample_indices(frames, 10, 1, 10)
    with pytest.raises(ValueError, match="0 frames"):
        sample_indices(frames, 0, 1, 0, np.random.default_rng(0))
    with pytest.raises(ManifestError, match="min: 6 is not a multiple of clip_frames"):
        FramesConfig(sampler="dynamic_fps1", min=6, max=8, size=32)


def test_media_seed_depends_on_seed_and_key():
    assert media_seed(0, "v1") == media_seed(0, "v1")
    assert len({media_seed(s, k) for s in range(4) for k in ("v1", "v2")}) == 8


def test_a_sampler_without_a_rule_is_named():
    with pytest.raises(ValueError, match="'newest' has no rule"):
        frame_indices("newest", 10, 1.0, 10.0, 4, 8, 4)
