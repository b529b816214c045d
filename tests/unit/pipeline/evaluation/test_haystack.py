"""Images inserted into videos: which frame is replaced, that others do not change, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.evaluation.haystack import Haystack, HaystackCell
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.index import ShardsError
from tests.helpers.corpora.needles import DEPTHS, FRAMES, make
from tests.helpers.corpora.training_corpus import COLOURS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("haystack")


@pytest.fixture(scope="module")
def manifest(folder) -> Manifest:
    return make(folder)


def asked(manifest: Manifest, folder: Path, videos: tuple[str, ...] = ("0.mp4", "1.mp4"), frames=FRAMES) -> Haystack:
    return Haystack(manifest, folder / "needles.json", folder, [folder / name for name in videos], frames, DEPTHS)


def test_every_needle_is_asked_in_every_cell(manifest, folder):
    haystack = asked(manifest, folder)
    cells = {HaystackCell(count, depth) for count in FRAMES for depth in DEPTHS}
    assert set(haystack.cells.values()) == cells and len(haystack) == 2 * len(cells)
    found = {(haystack[i].family, haystack[i].answer) for i in range(len(haystack))}
    assert found == {(cell.name, answer) for cell in cells for answer in ("red", "blue")}
    assert len({haystack[i].key for i in range(len(haystack))}) == len(haystack)
    assert haystack[0].options == ["red", "blue"]
    outside, several = haystack.rejected
    assert "needles.json: sample 3: " in outside and "needles are questions about one image" in several


def test_the_needle_replaces_one_frame_and_no_other(manifest, folder):
    """Other frames are those of the same video with another needle, whose place stands in the cell."""
    haystack = asked(manifest, folder, ("0.mp4",))
    for i in range(len(haystack)):
        other = next(j for j in range(len(haystack)) if haystack[j].family == haystack[i].family and j != i)
        own, blind = (haystack.prompt(i, media_of).clips.flatten(0, 1).numpy() for media_of in (None, other))
        cell = haystack.cells[haystack[i].family]
        assert len(own) == cell.frames
        changed = np.flatnonzero((own != blind).any(axis=(1, 2, 3))).tolist()
        assert changed == [round(cell.depth / 100 * (cell.frames - 1))]
        colour = np.array(COLOURS[haystack[i].answer])
        assert abs(own[changed[0]].astype(int) - colour).max() <= 8


def test_frames_and_words_are_those_of_the_sampler(manifest, folder):
    haystack = asked(manifest, folder, ("0.mp4",))
    row = haystack.prompt(len(haystack) - 1)
    said = haystack.chat_template.tokenizer.decode([token for token in row.input_ids.tolist() if token >= 0])
    places = ((np.linspace(0, 32, 17).astype(int)[:-1] + np.linspace(0, 32, 17).astype(int)[1:] - 1) // 2) / 4
    seconds = ", ".join(f"{float(second)}" for second in np.around(places, 1))
    assert f"The video lasts for 8.00 seconds, and 16 frames are uniformly sampled at {seconds} seconds." in said
    assert haystack.prompt_length(len(haystack) - 1) == row.tokens


@pytest.mark.parametrize(
    ("videos", "frames", "message"),
    [(("0.mp4",), (4, 64), "has 32 frames"), (("red.png",), (4,), "is an image"), (("none.mp4",), (4,), "none.mp4")],
)
def test_videos_that_cannot_hide_anything_are_refused(manifest, folder, videos, frames, message):
    with pytest.raises(MediaError, match=message):
        asked(manifest, folder, videos, frames)


def test_rows_of_a_mixed_table_are_all_read(manifest, folder):
    """A parquet file has null where a row lacks a column."""
    turns = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "red"}]
    fields = ({"image": "red.png", "options": ["red", "blue"]}, {"video": "0.mp4", "intervals": [[1.0, 2.0]]})
    rows = [{"conversations": turns, **more} for more in (*fields, {"video": "0.mp4", "start": 1.0, "name": "a"})]
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), folder / "mixed.parquet")
    found = FileQuestions(manifest, folder / "mixed.parquet", folder)
    assert found.rejected == []
    assert [(one.options, one.intervals) for one in found] == [(["red", "blue"], None), ([], [(1.0, 2.0)]), ([], None)]


def test_needles_are_images(manifest, folder, tmp_path):
    turns = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "needles.json").write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(ShardsError, match="no question about one image"):
        Haystack(manifest, tmp_path / "needles.json", folder, [folder / "0.mp4"], FRAMES, DEPTHS)
