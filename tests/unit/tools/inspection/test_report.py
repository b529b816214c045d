"""inspect_shards: the page shows the counts and frames of the root, and escapes all text of the data."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.pipeline.shards.ledger import read_ledger, write_ledger
from framestream.pipeline.tokenization.token_files import SCHEMA as TOKEN_SCHEMA
from framestream.pipeline.utils.digests import file_digest
from framestream.tools.inspect_shards import main
from framestream.tools.inspection.report import UsageStats, _sample_media, bins
from tests.helpers.corpora.small_build import HOSTILE, build_root
from tests.helpers.corpora.small_root import Root, turns
from tests.helpers.html_page import Page


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_root(tmp_path_factory.mktemp("inspected"))


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(built, tmp_path / "stage2"))


def page_of(root: Path, out: Path, *options: str) -> Page:
    assert main([str(root), "--html", str(out), *options]) == 0
    return Page(out.read_text(encoding="utf-8"))


def images(page: Page) -> list[tuple[str, np.ndarray]]:
    """Text and pixels (H, W, 3) of every image."""
    found = [attributes for tag, attributes in page.tags if tag == "img"]
    data = [base64.b64decode(item["src"].removeprefix("data:image/jpeg;base64,")) for item in found]
    pixels = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in data]
    return [(item["alt"], picture) for item, picture in zip(found, pixels, strict=True)]


def test_the_page_says_what_the_root_holds(built, tmp_path):
    text = page_of(built, tmp_path / "deep" / "page.html").cells()
    facts = "dialogues 6 held out 2 videos 4 video duration 10.5 s images 3 stored frames 19 shards 5 size"
    assert facts in text
    for entry in json.loads((built / "build.json").read_text())["entries"]:
        planned, dialogues = entry["planned"], entry["dialogues"]
        row = f"{entry['name']} {planned} {dialogues} {planned - dialogues} {entry['media']} {entry['frames']}"
        assert row in text
    assert "2 entries 10 8 2 7 19" in text
    for row in read_ledger(built).to_pylist():
        assert re.search(rf"{row['kind']} {row['reason']} 1 .*{re.escape(row['message'])}", text)
    assert "video train 1 4" in text and "dialogue val 1 2" in text
    assert "4: min 1.5, median 3" in text  # seconds of three videos and a clip
    assert "Visual tokens only" in text and "8: min 0, median 64, 95 % up to 106, max 128" in text


def test_frames_are_those_stored_with_their_seconds_and_dialogues(built, tmp_path):
    page = page_of(built, tmp_path / "page.html", "--media", "100")
    text, index = page.cells(), Index.open(built)
    assert "7 media, drawn with seed 0" in text
    shown = images(page)
    assert len(shown) == 19
    for row in index.media.to_pylist():
        with open(index.shard_path(row["shard"]), "rb") as file:
            for place, (offset, size) in enumerate(zip(row["frame_offset"], row["frame_size"], strict=True)):
                file.seek(offset)
                stored = Image.open(io.BytesIO(file.read(size))).convert("RGB")
                alt = f"frame at {row['timestamps'][place]:.2f} s" if row["kind"] == "video" else "image"
                assert any(
                    name == alt
                    and picture.shape[1::-1] == stored.size
                    and np.abs(picture - np.float32(stored)).mean() < 4
                    for name, picture in shown
                )
        assert row["key"] in text and row["source"] in text
    for row in index.dialogues.to_pylist():
        for turn in json.loads(row["conversations"]):
            assert " ".join(turn["value"].split()) in text
    assert "clip" in text and "Hello" in text


def test_nothing_comes_from_elsewhere_and_text_stays_text(built, tmp_path):
    page = page_of(built, tmp_path / "page.html", "--media", "100")
    assert " ".join(HOSTILE.split()) in page.cells() and "<i>h</i>" in page.cells() and "<b>2.png" in page.cells()
    assert not {"script", "b", "i", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,"), tag
    style = (tmp_path / "page.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_the_seed_decides_what_is_shown(built, tmp_path):
    pages = []
    for seed in ("3", "3", "4"):
        page_of(built, tmp_path / "page.html", "--media", "2", "--frames", "2", "--seed", seed)
        pages.append((tmp_path / "page.html").read_text().replace(f"seed {seed}", ""))
    assert pages[0] == pages[1] != pages[2]


def test_frames_that_cannot_be_read_are_said_to_be(root, tmp_path):
    video = root / "video" / "train-000000.tar"
    video.write_bytes(bytes(video.stat().st_size))
    (root / "image" / "val-000000.tar").unlink(missing_ok=True)
    (root / "image" / "train-000000.tar").unlink()
    page = page_of(root, tmp_path / "page.html", "--media", "100")
    assert page.cells().count("cannot be read") == 19 and not images(page)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "build.json").unlink(), "no finished shards here"),
        (lambda root: (root / "ledger" / "ledger.parquet").unlink(), "ledger.parquet"),
        (lambda root: (root / "ledger" / "ledger.parquet").write_bytes(b"PAR1"), "damaged ledger"),
        (lambda root: (root / "index" / "media.arrow").write_bytes(b"ARROW1"), "cannot be read"),
        (lambda root: (root / "build.json").write_text('{"index_fingerprint": "", "entries": [{}]}'), "not a sha256"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_no_page(root, tmp_path, capsys, change, words):
    change(root)
    assert main([str(root), "--html", str(tmp_path / "page.html")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message
    assert not (tmp_path / "page.html").exists()


def write_tokens(root, table):
    with pa.ipc.new_file(str(root / "new.arrow"), TOKEN_SCHEMA) as writer:
        writer.write_table(table)
    return (root / "new.arrow").rename(root / "index" / f"tokens-00-{file_digest(root / 'new.arrow')}.arrow")


def test_token_caches_of_other_indexes_or_damaged_are_ignored(root, tmp_path):
    row = {"ids": [], "labels": [], "clips": 0, "tiles": 0, "learned": 0}
    table = pa.Table.from_pylist([row | {"length": 1000 + n, "error": "x" * (n == 0)} for n in range(8)], TOKEN_SCHEMA)
    (root / "index" / "tokens-ff.arrow").write_bytes(b"")
    path = write_tokens(root, table)
    text = page_of(root, tmp_path / "page.html").cells()
    assert "8: min 1k, median 1k" in text and f"from {path.name}; 1 dialogues cannot be used" in text
    path.unlink()
    write_tokens(root, table[:7])
    assert "Visual tokens only" in page_of(root, tmp_path / "page.html").cells()


def test_a_root_of_text_alone_has_a_page(tmp_path):
    folder = Root(tmp_path)
    for number in range(5):
        folder.dialogue(turns(f"Question {number}?", "Answer."))
    root = folder.write() / "stage2"
    write_ledger(root / "ledger" / "ledger.parquet", LEDGER_SCHEMA.empty_table())
    text = page_of(root, tmp_path / "page.html", "--media", "30").cells()
    assert "Nothing was left out" in text and all(f"Question {number}?" in text for number in range(5))


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 10**10), st.floats(0, 1e7, allow_subnormal=False)), min_size=1, max_size=300))
def test_every_value_is_in_one_bin(values):
    found = bins(np.array(values))
    assert sum(item.count for item in found) == len(values)
    assert len(found) <= 60
    assert all(a.high <= b.low if a.low < a.high else a.low < b.low for a, b in zip(found, found[1:], strict=False))
    for number, item in enumerate(found):
        last = number == len(found) - 1 or item.low == item.high
        assert item.count == sum(item.low <= value < item.high or (last and value == item.high) for value in values)


@pytest.mark.parametrize("said", ["[", "[1]", '[{"from": "gpt"}]', "[" * 10_000])
def test_conversations_of_another_form_are_one_line(tmp_path, capsys, said):
    folder = Root(tmp_path)
    folder.dialogue(turns("Question?", "Answer."))
    folder.dialogues[0]["conversations"] = said
    root = folder.write() / "stage2"
    write_ledger(root / "ledger" / "ledger.parquet", LEDGER_SCHEMA.empty_table())
    assert main([str(root), "--html", str(tmp_path / "page.html")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "conversations are not in the format; run tools/verify_shards.py" in message


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 9))
def test_media_are_drawn_from_the_entries_in_turn(entries, count, seed):
    """Entries of different media: numbers drawn from them differ by more than one only where one has no more."""
    entry = np.sort(np.array(entries, dtype=np.int32))
    media = np.arange(len(entry), dtype=np.int32)
    drawn = _sample_media(UsageStats(media, media, entry, np.ones(len(entry))), count, np.random.default_rng(seed))
    assert len(set(drawn)) == len(drawn) == min(count, len(entry))
    taken = np.bincount(entry[drawn], minlength=7)
    there = np.bincount(entry, minlength=7)
    assert all(taken[number] == there[number] or taken[number] >= taken.max() - 1 for number in range(7))
