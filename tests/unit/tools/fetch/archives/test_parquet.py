"""Images in parquet files with the layout of datasets on the hub.

They are found by path and by id, and read row group by row group. Ambiguous names are refused."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from framestream.pipeline.utils.parquet_footer import ColumnChunk, read_footer
from framestream.tools import build_shards
from framestream.tools.fetch.archives import parquet as parquets
from framestream.tools.fetch.archives.archive import ArchiveSource, open_archives
from framestream.tools.fetch.archives.parquet_rows import MAX_SAME_NAME
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.registry import open_source
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.media.memory_files import LIMIT, Memory, content, failure, opened, pack, refused
from tests.helpers.servers.fetch_hub import serve_hub
from tests.helpers.servers.web_server import QUICK

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TALK = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
Row = tuple[Any, "str | None", "bytes | None"]  # id, path, image; a row of text alone has no path and no image


def data_set(rows: Sequence[Row], group: int = 100, **options: Any) -> bytes:
    """A parquet file with the columns of LLaVA-OneVision-Data."""
    images = [None if path is data is None else {"bytes": data, "path": path} for _, path, data in rows]
    columns = {
        "id": pa.array([name for name, _, _ in rows]),
        "image": pa.array(images, IMAGE),
        "conversations": pa.array([corpus.TURNS] * len(rows), TALK),
        "data_source": pa.array(["here"] * len(rows)),
    }
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, row_group_size=group, **options)
    return out.getvalue()


def table(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def noise(seed: int, size: int = 3000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def found(source: ArchiveSource, path: str, scratch: Path) -> bytes | str:
    """Return the bytes of a file, or the reason of its failure."""
    try:
        return content(source, path, scratch)
    except FetchError as error:
        assert "\n" not in str(error)
        return error.reason


# Names ----------------------------------------------------------------------------------------------------------------


def test_every_picture_is_found_by_its_path_and_by_its_id(tmp_path):
    rows = [(f"set/{n:03d}", f"{n:03d}.jpg", noise(n)) if n % 5 else (f"text-{n}", None, None) for n in range(60)]
    source = opened(data_set(rows[:35], group=8), data_set(rows[35:], group=7), work=tmp_path)
    assert source.notes == []
    for name, path, data in rows:
        if data is None:
            assert source.find(name) is None and failure(source, f"{name}.png", tmp_path) == "missing_file"
            continue
        for asked in (path, path.replace(".jpg", ".png"), path[:-4], name, f"{name}.png", f"other/{path}"):
            assert source.find(asked) == UNKNOWN
            assert content(source, asked, tmp_path) == data
    assert source.find("set", tree=True) is None


def test_the_nearest_name_counts(tmp_path):
    rows = [
        ("a", "x/1.png", b"png of x"),
        ("b", "x/1.jpg", b"jpg of x"),
        ("c", "y/1.jpg", b"y"),
        ("x/2", "3.jpg", b"id 2"),
        ("3", "4.jpg", b"id 3"),
        ("v1.5_0", None, b"dotted"),
        ("e.jpg", "f.tar.JPEG", b"both"),
        (None, "/root/of/another/machine/7.jpg", b"seven"),
    ]
    source = opened(data_set(rows))
    asked = {"x/1.png": b"png of x", "x/1.jpg": b"jpg of x", "y/1.png": b"y", "y/1": b"y"}
    asked |= {"x/2.png": b"id 2", "2.png": b"id 2", "4.png": b"id 3", "v1.5_0.png": b"dotted", "v1.png": "missing_file"}
    asked |= {"e.png": b"both", "e.jpg": b"both", "e.jpg.png": b"both", "f.tar.jpeg": b"both", "f.png": "missing_file"}
    asked |= {"7.jpg": b"seven", "of/7.png": b"seven", "machine/7.jpg": b"seven"}
    asked |= {"x/1.gif": "bad_media", "1.png": "bad_media", "3.png": "bad_media"}  # more than one image
    asked |= {"3.jpg": b"id 2"}  # stored with this very path
    asked |= {"z/1.jpg": "missing_file", "x/4.png": b"id 3", "x/a.png": b"png of x"}
    assert {path: found(source, path, tmp_path) for path in asked} == asked


def test_rows_of_one_name_are_one_picture_or_none(tmp_path):
    rows = [("same", "same.jpg", b"1"), ("same", "same.jpg", b"1"), ("other", "same.png", b"2")]
    source = opened(data_set(rows, group=2), data_set([("same", None, b"1"), ("other", None, b"3")]))
    assert content(source, "same.jpg", tmp_path) == b"1"
    with pytest.raises(FetchError, match=r"same.gif: 2 different images of here have this name; name") as error:
        source.fetch("same.gif", tmp_path)
    assert error.value.reason == "bad_media" and list(tmp_path.iterdir()) == []
    assert failure(source, "other.jpg", tmp_path) == "bad_media", "across files, too"
    assert source.identity("same.jpg") != source.identity("other.jpg")
    many = opened(data_set([("same", None, b"1")] * (MAX_SAME_NAME + 1)))
    assert failure(many, "same.jpg", tmp_path) == "bad_media", "so many are not compared"


def test_parquet_files_beside_other_archives(tmp_path):
    packed = pack({"a.jpg": b"of the zip"}, "stored")
    source = opened(data_set([("a", "a.jpg", b"of the row"), ("b", "b.jpg", b"B")]), packed, work=tmp_path)
    assert content(source, "a.jpg", tmp_path) == b"of the zip", "its path is the exact one"
    assert (content(source, "b.jpg", tmp_path), source.find("a.jpg")) == (b"B", 10)
    inner = opened(data_set([("7", "deep/down/7.jpg", b"seven"), ("8", "8.jpg", b"eight")]), inside="deep/down")
    assert (content(inner, "7.png", tmp_path), content(inner, "8.png", tmp_path)) == (b"seven", b"eight")


def by_the_rules(rows: Sequence[Row], asked: str) -> bytes | str:
    """Return the image of a path by the rules of docs/building.md, from a search of all rows."""

    def stem(name: str) -> str:
        while name.lower().endswith((".jpg", ".png")) and name.rpartition("/")[2] not in (".jpg", ".png"):
            name = name[:-4]
        return name

    def last(name: str) -> str:
        return name.rpartition("/")[2]

    members = []
    for name, path, data in rows:
        path = last(path) if path and path.startswith("/") else path
        usable = [text if text and ".." not in text.split("/") else None for text in (path, name)]
        members.append((usable[0], [stem(text) for text in usable if text], data))
    asked_stem = stem(asked)
    rules = (
        lambda path, stems: path == asked,
        lambda path, stems: asked_stem in stems,
        lambda path, stems: any(
            last(name) == last(asked_stem) and not ("/" in name and "/" in asked_stem) for name in stems
        ),
    )
    for rule in rules:
        if alike := [data for path, stems, data in members if rule(path, stems)]:
            images = set(alike) - {None}
            if len(alike) > MAX_SAME_NAME or len(images) > 1:
                return "bad_media"
            return images.pop() if images else "missing_file"
    return "missing_file"


NAMES = ["a", "b", "x/a", "y/a", "x/b", "a.jpg", "a.PNG", "x/a.jpg", "x/a.png", "a.b", "a.b.jpg", "x/y/a", "a.jpg.png"]
names = st.none() | st.sampled_from([*NAMES, "", "../a", "x/../b", "/home/me/a.jpg"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(names, names, st.sampled_from([None, b"1", b"2", b"3"])), min_size=1, max_size=6))
def test_what_is_found_is_what_the_rules_say(tmp_path_factory, rows):
    tmp_path = tmp_path_factory.mktemp("rows")
    columns = {"id": pa.array([row[0] for row in rows], pa.string())}
    columns["image"] = pa.array([{"bytes": data, "path": path} for _, path, data in rows], IMAGE)
    source = opened(table(**columns))
    assert {name: found(source, name, tmp_path) for name in NAMES} == {name: by_the_rules(rows, name) for name in NAMES}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [pa.int64(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_ids_of_other_types(tmp_path, kind):
    """Dictionary columns are read as dictionaries if the file says so."""
    image = pa.array([{"bytes": b"7"}], pa.struct([("bytes", pa.large_binary())]))
    data = table(image=image, id=pa.array([17] if kind == pa.int64() else ["17"], kind))
    assert content(opened(data), "17.png", tmp_path) == b"7"


# What is read ---------------------------------------------------------------------------------------------------------


def test_listing_costs_the_names_and_a_picture_its_row_group(tmp_path):
    rows = [(f"{n}", f"{n}.jpg", noise(n, 20_000)) for n in range(400)]
    file = Memory(data_set(rows, group=50))
    source = open_archives([file], False, "", tmp_path, LIMIT, "here")
    assert file.moved < 200_000 < file.size / 30
    file.reads.clear()
    assert content(source, "210.png", tmp_path) == rows[210][2]
    assert file.moved < 1_500_000, "a row group, and the directory"
    file.reads.clear()
    for row in (211, 240, 205, 249, 200):
        assert content(source, f"{row}.png", tmp_path) == rows[row][2]
    assert file.reads == [], "neighbours come out of the same page"
    assert content(source, "0.png", tmp_path) == rows[0][2] and file.moved < 1_100_000


def test_images_in_any_order_with_a_small_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(parquets, "_CACHED_IMAGES", 10_000)
    rows = [(f"{n}", None, noise(n)) for n in range(60)]
    source = opened(data_set(rows, group=25), data_set([(f"b{n}", None, noise(100 + n)) for n in range(9)], group=4))
    for n in np.random.default_rng(0).permutation(60).tolist():
        assert content(source, f"{n}.jpg", tmp_path) == rows[n][2]
        assert content(source, f"b{n % 9}.jpg", tmp_path) == noise(100 + n % 9)
    assert len(parquets._open_groups._readers) <= 2
    assert all(group._cached_bytes <= 10_000 for group in parquets._open_groups._readers.values())


@pytest.mark.parametrize("options", [{"compression": kind} for kind in ("none", "zstd", "gzip")] + [
    {"use_dictionary": False, "data_page_size": 1000, "write_batch_size": 4},
    {"data_page_version": "2.0", "write_page_checksum": True, "write_page_index": True},
    {"version": "1.0", "store_schema": False},
])  # fmt: skip
def test_files_of_other_writers(tmp_path, options):
    rows = [(f"{n}", f"{n}.jpg" if n % 3 else None, noise(n)) for n in range(40)]
    source = opened(data_set(rows, group=15, **options))
    assert [content(source, f"{name}.png", tmp_path) for name, *_ in rows] == [data for *_, data in rows]


def test_lists_are_made_once_and_by_changed_files_anew(tmp_path):
    file = Memory(data_set([("a", "a.jpg", b"A")]))
    for _ in range(2):
        source = open_archives([file], False, "", tmp_path, LIMIT, "here")
        assert source.find("a.png") == UNKNOWN
        first, file.reads = file.moved, []
    assert first == 0
    changed = Memory(data_set([("a", "a.jpg", b"B")]))
    again = open_archives([changed], False, "", tmp_path, LIMIT, "here")
    assert content(again, "a.png", tmp_path) == b"B" and again.identity("a.png") != source.identity("a.png")


def test_over_a_server_by_ranges(server, tmp_path):
    rows = [(f"{n}", f"{n}.jpg", noise(n, 50_000)) for n in range(120)]
    data = data_set(rows, group=30)
    server.routes["/one.parquet"] = lambda request: request.serve(data)
    location = {"archives": f"url:{server.url}/one.parquet"}
    source = open_source(location, QUICK, tmp_path / "work")
    assert content(source, "70.png", tmp_path) == rows[70][2] and content(source, "71.png", tmp_path) == rows[71][2]
    ranges = [asked.removeprefix("bytes=").split("-") for asked in server.ranges("/one.parquet")]
    assert sum(int(end) + 1 - int(start) for start, end in ranges) < len(data) / 2 and len(ranges) < 20


def test_a_server_that_breaks_off_costs_one_picture_and_no_other(tmp_path):
    class Broken(Memory):
        down = False

        def read(self, offset: int, size: int) -> bytes:
            if self.down:
                raise FetchError("unreachable", self.name, "the server broke off")
            return super().read(offset, size)

    rows = [(f"{n}", None, noise(n)) for n in range(20)]
    file = Broken(data_set(rows, group=10, use_dictionary=False, data_page_size=100, write_batch_size=1))
    source = open_archives([file], False, "", None, LIMIT, "here")
    assert content(source, "3.jpg", tmp_path) == rows[3][2]
    file.down = True
    with pytest.raises(FetchError, match="the server broke off"):
        source.fetch("12.jpg", tmp_path)
    file.down = False
    assert [content(source, f"{n}.jpg", tmp_path) for n in range(20)] == [data for *_, data in rows]


# Damage and limits ----------------------------------------------------------------------------------------------------


def chunk(data: bytes, column: str, number: int = 0) -> tuple[int, int]:
    """Return start and end of a column of a row group."""
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(number)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size


GOOD = data_set([(f"{n}", f"{n}.jpg", noise(n)) for n in range(20)], group=10, use_dictionary=False)


@pytest.mark.parametrize(
    "data, reason, words",
    [
        (b"PAR1", "truncated", "no footer at its end"),
        (GOOD[:-1], "truncated", "no footer at its end"),
        (GOOD[: len(GOOD) // 2], "truncated", "fetch it again"),
        (GOOD[:-4] + b"PARE", "truncated", "no footer"),
        (GOOD[:-8] + struct.pack("<L", 1 << 31) + b"PAR1", "corrupt", "longer than the file"),
        (GOOD[:-8] + struct.pack("<L", 9) + b"PAR1", "corrupt", "is damaged"),
        (b"PAR1" + bytes(600) + struct.pack("<L", 500) + b"PAR1", "corrupt", "is damaged"),
        (table(a=["x"], b=[1]), "unsupported", "no column image of {bytes, path}; its columns are a, b"),
        (table(image=["a.jpg"], id=["a"]), "unsupported", "no column image"),
        (table(image=[[{"bytes": b"x", "path": "a"}]], id=["a"]), "unsupported", "no column image"),
        (table(image=[{"bytes": b"x"}], id=[[1]]), "unsupported", "neither image.path nor id"),
    ],
)
def test_invalid_files(data, reason, words):
    found, line = refused(data)
    assert found == reason and words in line


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"version": "1.0"}, {"write_page_index": True}])
def test_the_directory_is_that_of_pyarrow(options):
    data = data_set([(f"{n}", f"{n}.jpg" if n % 2 else None, noise(n, 50)) for n in range(500)], group=7, **options)
    expected = pq.ParquetFile(io.BytesIO(data)).metadata
    rows, groups = read_footer(data[-8 - int.from_bytes(data[-8:-4], "little") : -8], {"id", "image.bytes"})
    assert (rows, len(groups)) == (500, expected.num_row_groups)
    for number, found in enumerate(groups):
        group = expected.row_group(number)
        columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
        assert found.rows == group.num_rows and found.chunks.keys() == {"id", "image.bytes"}
        for name, (start, packed, size, values, *_) in found.chunks.items():
            column = columns[name]
            expected_sizes = (column.total_compressed_size, column.total_uncompressed_size, column.num_values)
            assert (packed, size, values) == expected_sizes
            assert start == (column.dictionary_page_offset or column.data_page_offset)


def test_a_directory_that_pyarrow_dies_of():
    """The column id has an invalid repetition type: pyarrow aborts the process when it is asked for the chunk."""
    data = data_set([("a", "a.jpg", b"x")], store_schema=False)
    damaged = data.replace(b"\x25\x02\x18\x02id", b"\x25\x03\x18\x02id")
    assert damaged != data
    source = opened(damaged)
    assert source.find("a.jpg") is None and "the names of row group 0 cannot be read" in source.notes[0]


def test_limits(tmp_path, monkeypatch):
    data = data_set([("small", None, bytes(1000)), ("large", None, bytes(1001))])
    source = opened(data, limit=1000)
    assert content(source, "small.jpg", tmp_path) == bytes(1000)
    assert failure(source, "large.jpg", tmp_path) == "too_large"
    monkeypatch.setattr(parquets, "MAX_ROWS", 1)
    assert refused(data)[0] == "too_large"
    monkeypatch.undo()
    monkeypatch.setattr(parquets, "MAX_FOOTER", 100)
    assert refused(data)[0] == "too_large"
    monkeypatch.undo()
    monkeypatch.setattr(parquets, "RATIO_SLACK", 1 << 20)
    long = "n" * 4000
    names = data_set([(f"{long}{n % 10}", None, b"x") for n in range(4000)], group=4000, compression="zstd")
    assert len(names) < 200_000 and refused(names)[0] == "too_large", "names that unpack to more than they may"
    bomb = data_set([("bomb", None, bytes(60 << 20))], compression="zstd", use_dictionary=False)
    assert len(bomb) < 100_000 and found(opened(bomb), "bomb.jpg", tmp_path) == "too_large"
    monkeypatch.undo()
    monkeypatch.setattr(parquets, "MAX_PAGE", 1 << 20)
    page = data_set([("page", None, noise(0, 2 << 20))])
    assert found(opened(page), "page.jpg", tmp_path) == "too_large"


def test_row_groups_that_share_their_pages_are_refused():
    """A small file that lists the same pages again and again would take the memory of all."""
    data = data_set([(str(number), f"{number}.jpg", noise(number)) for number in range(4)])
    metadata = pq.read_metadata(io.BytesIO(data))
    for _ in range(9):
        metadata.append_row_groups(pq.read_metadata(io.BytesIO(data)))
    footer = io.BytesIO()
    metadata.write_metadata_file(footer)
    size = struct.unpack("<I", data[-8:-4])[0]
    reason, line = refused(data[: -8 - size] + footer.getvalue()[4:])
    assert reason == "corrupt" and "row groups have more of column" in line


def test_dictionaries_that_are_used_often(tmp_path, monkeypatch):
    """A dictionary has each image and name once; what counts is what its uses add up to."""
    rows = [(None, f"{number}.jpg", bytes(100_000)) for number in range(300)]
    images = opened(data_set(rows, compression="zstd"))
    assert found(images, "299.jpg", tmp_path) == bytes(100_000)
    names = data_set([(None, "n" * 100_000, b"image")] * 300, compression="zstd")
    opened(names)
    monkeypatch.setattr(parquets, "RATIO_SLACK", 1 << 23)
    images = opened(data_set(rows, group=300, compression="zstd"))
    assert found(images, "9.jpg", tmp_path) == bytes(100_000) and found(images, "299.jpg", tmp_path) == "too_large"
    assert refused(data_set([(None, "n" * 100_000, b"image")] * 300, group=300, compression="zstd"))[0] == "too_large"


def test_a_page_that_states_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    data = data_set([(None, "a.jpg", noise(1))], compression="zstd", use_dictionary=False)
    start, _ = chunk(data, "image.bytes")
    assert data[start : start + 3] == b"\x15\x00\x15", "field 1, a data page, then field 2, its unpacked size"
    assert data[start + 3] & 128 and not data[start + 4] & 128, "a varint of two bytes, in zigzag encoding"
    header = data[start : start + 3] + b"\xfe\xff\xff\xff\x0f" + data[start + 5 :]
    totals = parquets.add_up_pages(lambda offset, size: header[offset : offset + size], ColumnChunk(0, 20, 100, 1))
    assert totals.size == 2**31 - 1 and found(opened(data), "a.jpg", tmp_path) == noise(1)
    monkeypatch.setattr(parquets, "add_up_pages", lambda *_, **__: totals)
    assert refused(data)[0] == "too_large"


def test_a_row_group_with_damaged_names_loses_its_images(tmp_path):
    start, end = chunk(GOOD, "image.path", 1)
    source = opened(GOOD[:start] + b"\xff" * (end - start) + GOOD[end:])
    assert "the names of row group 1 cannot be read" in source.notes[0] and "fetch it again" in source.notes[0]
    assert content(source, "9.jpg", tmp_path) == noise(9) and failure(source, "10.jpg", tmp_path) == "missing_file"


def test_damaged_images_are_corrupt(tmp_path):
    start, end = chunk(GOOD, "image.bytes", 1)
    source = opened(GOOD[:start] + b"\xff" * (end - start) + GOOD[end:])
    assert failure(source, "15.jpg", tmp_path) == "corrupt" and content(source, "5.jpg", tmp_path) == noise(5)
    image = noise(1, 9000)  # larger than what is repeated as a minimum
    checked = data_set([("a", None, image)], write_page_checksum=True, compression="none", use_dictionary=False)
    offset = checked.index(image)
    changed = checked[: offset + 50] + bytes([checked[offset + 50] ^ 1]) + checked[offset + 51 :]
    assert failure(opened(changed), "a.jpg", tmp_path) == "corrupt", "where the writer left checksums"


def test_rows_without_images_or_names(tmp_path):
    source = opened(data_set([("a", "a.jpg", None), (None, "..", b"x"), ("a\0b", None, b"y"), ("b", "b.jpg", b"B")]))
    assert failure(source, "a.jpg", tmp_path) == "missing_file" and content(source, "b.jpg", tmp_path) == b"B"
    assert "2 images have neither a path nor an id" in source.notes[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_ends_in_a_reason_of_the_ledger(tmp_path_factory, changes):
    """Any byte may be wrong, most of all in the footer."""
    tmp_path = tmp_path_factory.mktemp("damage")
    data = bytearray(GOOD)
    footer = int.from_bytes(GOOD[-8:-4], "little") + 8
    for position, value in changes:
        data[len(data) - 1 - int(footer * position)] = value
    try:
        source = opened(bytes(data))
    except FetchError as error:
        assert "\n" not in str(error)
        return
    for name in ("0.jpg", "11.jpg", "19.png"):
        assert isinstance(found(source, name, tmp_path), (bytes, str))


# A build --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_build_takes_its_stills_from_parquet_files_of_the_hub(tmp_path, server, monkeypatch):
    """The shards equal those of a folder. Ambiguous, missing and invalid images are in the ledger."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)  # of the workers
    stills, rows = {}, []
    for number in range(12):
        path = corpus.still(tmp_path / "folder" / f"set/{number:03d}.png", seed=number)
        stills[f"set/{number:03d}.png"] = path.read_bytes()
        rows.append((f"set/{number:03d}", f"{number:03d}.jpg" if number % 2 else None, path.read_bytes()))
    (tmp_path / "folder" / "page.png").write_text("<html>")
    rows += [("page", None, b"<html>"), ("text", None, None)]
    halves = data_set(rows[:7], group=3), data_set(rows[7:], group=4)
    serve_hub(server, {f"textocr(gpt4v)/train-0000{n}-of-00002.parquet": data for n, data in enumerate(halves)})
    samples = [{"id": path, "image": path, "conversations": corpus.TURNS} for path in [*stills, "page.png", "none.png"]]
    corpus.annotations(tmp_path / "textcaps.json", samples)
    entry = {"annotation": str(tmp_path / "textcaps.json"), "root": "https://example.org/textcaps"}
    roots = {}
    for name, location in (
        ("folder", f"dir:{tmp_path}/folder"),
        ("hub", {"archives": "hf:me/data:textocr(gpt4v)/*.parquet"}),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({entry["root"]: location}))
        data = {"entries": [entry], "roots": str(tmp_path / f"{name}.yaml"), "cache": str(tmp_path / "cache")}
        manifest = corpus.manifest(tmp_path / name / "stage2.yaml", [entry], data=data)
        assert build_shards.main(["--stage", "2", "--manifest", str(manifest), "--workers", "1"]) == 0
        roots[name] = tmp_path / name / "shards" / "stage2"
    reasons = [
        sorted((row["source"], row["reason"]) for row in read_ledger(root).to_pylist() if row["kind"] == "media")
        for root in roots.values()
    ]
    assert [reason for _, reason in reasons[1]] == ["missing_file", "not_media"] and reasons[0] == reasons[1]
    tars = [
        {tar.relative_to(root): hashlib.sha256(tar.read_bytes()).digest() for tar in root.rglob("*.tar")}
        for root in roots.values()
    ]
    assert tars[0] == tars[1] and len(Index.open(roots["hub"]).media) == len(stills)
    assert {request for request, headers in server.asked if "range" not in headers and "/cdn/" in request} == set()
