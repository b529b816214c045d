"""The index: what is written is read, through memory maps, and unfinished roots are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from framestream.pipeline.shards.index import (
    BATCH_ROWS,
    DIALOGUE_SCHEMA,
    MEDIA_SCHEMA,
    SHARD_SCHEMA,
    Index,
    ShardsError,
    build_table,
    row_values,
    write_index,
)

SHARDS = [{"folder": "video", "split": "train", "name": "train-000000.tar", "samples": 2, "bytes": 10, "sha256": "a"}]


def _media(number: int, frames: int = 4) -> dict[str, Any]:
    numbers = list(range(frames))
    row = {"key": f"v{number}", "kind": "video", "split": "train", "shard": 0, "offset": 512 + number, "size": 2**33}
    row |= {"width": 64, "height": 64, "source_width": 640, "source_height": 272, "vlen": 100, "fps": 25.0}
    row |= {"duration": 4.0, "start": 0.5, "sample": numbers, "frame_index": [25 * number for number in numbers]}
    row |= {"timestamps": [number + 0.5 for number in numbers], "frame_offset": [2**40 + number for number in numbers]}
    row |= {"frame_digest": [2**32 - 1] * frames}
    return row | {"frame_size": [9] * frames, "sha256": "0" * 64, "source": "a.mp4"}


def _dialogue(number: int) -> dict[str, Any]:
    row = {"key": f"d{number}", "split": "train", "entry": "e", "id": str(number), "media": [number] * (number % 3)}
    return row | {"conversations": json.dumps([{"from": "human", "value": "Ä?"}]), "meta": "{}"}


def _write(root: Path, media: int = 10, dialogues: int = 5) -> str:
    fingerprint = write_index(
        root,
        build_table(MEDIA_SCHEMA, map(_media, range(media))),
        build_table(DIALOGUE_SCHEMA, map(_dialogue, range(dialogues))),
        build_table(SHARD_SCHEMA, SHARDS),
    )
    (root / "build.json").write_text(json.dumps({"index_fingerprint": fingerprint}))
    return fingerprint


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    fingerprint = _write(tmp_path)
    index = Index.open(tmp_path)
    assert index.fingerprint == fingerprint
    assert index.media.to_pylist() == [_media(number) for number in range(10)]
    assert index.dialogues.to_pylist() == [_dialogue(number) for number in range(5)]
    assert index.shard_path(0) == tmp_path / "video" / "train-000000.tar"
    assert sorted(item.name for item in (tmp_path / "index").iterdir()) == [
        "dialogues.arrow",
        "media.arrow",
        "shards.arrow",
    ]


def test_an_empty_table_is_an_index_too(tmp_path: Path) -> None:
    _write(tmp_path, media=0, dialogues=0)
    assert Index.open(tmp_path).media.num_rows == 0


def test_lists_are_views_into_the_file(tmp_path: Path) -> None:
    rows = 2 * BATCH_ROWS + 7
    _write(tmp_path, media=rows)
    before = pa.total_allocated_bytes()
    index = Index.open(tmp_path)
    column = index.media["frame_offset"]
    assert [len(chunk) for chunk in column.chunks] == [BATCH_ROWS, BATCH_ROWS, 7]
    for row in (0, BATCH_ROWS - 1, BATCH_ROWS, rows - 1):
        values = row_values(column, row)
        assert values.tolist() == [2**40 + number for number in range(4)]
        assert not values.flags.owndata and not values.flags.writeable
    assert row_values(index.media["timestamps"], 5).dtype == np.float64
    assert pa.total_allocated_bytes() - before < 100_000 < (tmp_path / "index" / "media.arrow").stat().st_size


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
    one, same = _write(tmp_path / "one"), _write(tmp_path / "same")
    assert one == same != _write(tmp_path / "other", dialogues=6)


def test_a_large_table_in_one_piece_is_cut_into_batches(tmp_path: Path) -> None:
    whole = build_table(MEDIA_SCHEMA, map(_media, range(BATCH_ROWS + 1))).combine_chunks()
    write_index(tmp_path, whole, build_table(DIALOGUE_SCHEMA, []), build_table(SHARD_SCHEMA, SHARDS))
    with pa.ipc.open_file(str(tmp_path / "index" / "media.arrow")) as file:
        assert [file.get_batch(i).num_rows for i in range(file.num_record_batches)] == [BATCH_ROWS, 1]


def test_unfinished_and_damaged_roots_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match="build them with `python tools/build_shards.py"):
        Index.open(tmp_path / "absent")
    _write(tmp_path)
    good = (tmp_path / "build.json").read_text()
    (tmp_path / "build.json").unlink()  # written last: without it the build did not end
    with pytest.raises(ShardsError, match="no finished shards here"):
        Index.open(tmp_path)
    for text in ("{}", "not json", "[]"):
        (tmp_path / "build.json").write_text(text)
        with pytest.raises(ShardsError, match="build.json: (not a build record|index_fingerprint)|cannot be read"):
            Index.open(tmp_path)
    (tmp_path / "build.json").write_text(good)
    path = tmp_path / "index" / "media.arrow"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ShardsError) as caught:
        Index.open(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes((tmp_path / "index" / "dialogues.arrow").read_bytes())
    with pytest.raises(ShardsError, match="its files are not those of build.json"):
        Index.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("entries", {}, "specification.entries"),
        ("entries", [[]], "specification.entries"),
        ("entries", [{"root": "media", "sampling": "all"}], "specification.entries"),
        ("frames", [], "specification.frames"),
        ("frames", {"size": "224"}, "specification.frames"),
        ("frames", {"max": None}, "specification.frames"),
        ("frames", {"sampler": 4}, "specification.frames"),
    ],
)
def test_older_records_with_damaged_fields_are_one_line(tmp_path: Path, field: str, value: object, named: str) -> None:
    _write(tmp_path)
    record = json.loads((tmp_path / "build.json").read_text())
    record.pop("digest", None)
    (tmp_path / "build.json").write_text(json.dumps(record | {"specification": {field: value}}))
    with pytest.raises(ShardsError) as caught:
        Index.open(tmp_path)
    assert "build.json" in str(caught.value) and named in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_above_the_shards_names_those_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "shards" / "stage3")
    with pytest.raises(ShardsError, match="name one of its folders: stage3$"):
        Index.open(tmp_path / "shards")
    with pytest.raises(ShardsError, match="--stage 7 --manifest"):
        Index.open(tmp_path / "stage7")
    with pytest.raises(ShardsError, match="--stage N --manifest"):
        Index.open(tmp_path / "other")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHARDS", str(tmp_path / "shards"))
    for root in ("~/shards/stage3", "$SHARDS/stage3"):
        assert Index.open(root).media.equals(Index.open(tmp_path / "shards" / "stage3").media)
    (tmp_path / "shards" / "stage3" / "index" / "shards.arrow").unlink()
    with pytest.raises(ShardsError, match="shards.arrow.*remove .*stage3 and build the shards again"):
        Index.open(tmp_path / "shards" / "stage3")
