"""Damage inside the JPEG data of a shard: every changed byte of a frame is an error, not other pixels."""

import random

import numpy as np
import pyarrow as pa
import pytest

from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import Index, without_digests, write_index
from tests.helpers.corpora.small_root import Root


@pytest.fixture
def stage(tmp_path):
    made = Root(tmp_path)
    made.video(8, 8)
    made.still(60, 40)
    return made.write() / "stage2"


def read(index):
    """Return frames and image of the root."""
    reader = FrameReader(index)
    height, width, count = (index.media[name][0].as_py() for name in ("height", "width", "vlen"))
    out = np.empty((count, height, width, 3), dtype=np.uint8)
    reader.read_frames(0, list(range(count)), out)
    return out, reader.read_image(1)


def test_flips_within_frames_and_images_are_found(stage):
    index, rng = Index.open(stage), random.Random(3)
    assert all(index.media["frame_digest"].is_valid().to_pylist())
    for row in (0, 1):
        item = index.media.slice(row, 1).to_pylist()[0]
        path = index.shard_path(item["shard"])
        data = path.read_bytes()
        for number, (start, size) in enumerate(zip(item["frame_offset"], item["frame_size"], strict=True)):
            place = start + rng.randrange(size)
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
            name = f"stored frame {number}" if row == 0 else "the stored image"
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                read(Index.open(stage))
        path.write_bytes(data)


def test_roots_without_digests_give_the_same_pixels(stage):
    index = Index.open(stage)
    expected = read(index)
    media = pa.Table.from_batches(index.media.to_batches()).drop_columns("frame_digest")
    assert media.schema == without_digests(index.media.schema)
    for column, found in zip(expected, read(Index(index.storage, media, *_rest(index))), strict=True):
        np.testing.assert_array_equal(column, found)


def _rest(index):
    return index.dialogues, index.shards, index.fingerprint, index.specification, {}


def test_a_changed_index_is_not_opened(stage):
    index = Index.open(stage)
    media = index.media.to_pylist()
    media[0]["frame_offset"][0] += 1
    write_index(stage, pa.Table.from_pylist(media, index.media.schema), index.dialogues, index.shards)
    with pytest.raises(ValueError, match="not those of build.json"):
        Index.open(stage)
