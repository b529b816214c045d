"""The card of a root: configs that the hub reads, counts, and a user's text that stays."""

from __future__ import annotations

import pyarrow as pa
import pytest
from huggingface_hub import DatasetCard

from framestream.pipeline.shards.dataset_card import (
    BEGIN,
    CARD_FILE,
    END,
    MAX_CARD_BYTES,
    CardError,
    merge_cards,
    render_dataset_card,
    write_dataset_card,
)

SHARDS = [
    ("video", "train", "train-000000.tar", 2, 20480),
    ("dialogue", "train", "train-000000.tar", 3, 10240),
    ("video", "train", "train-000001.tar", 1, 10240),
    ("dialogue", "val", "val-000000.tar", 1, 10240),
]
ENTRY = {"planned": 4, "dialogues": 3, "media": 3, "frames": 1200, "bytes": 30000, "left_out": {}}
RECORD = {
    "entries": [{"name": "a|b<script>\n# no", **ENTRY}],
    "specification": {
        "frames": {"size": 64, "sampler": "dynamic_fps1"},
        "limit": 0,
        "nested_roots": [["/home/me/secret", "/home/me/secret/more", "more"]],
        "entries": [{"name": "a|b<script>\n# no", "root": "/home/me/secret", "sampling": "first:50%"}],
    },
}


def shard_table(rows=SHARDS) -> pa.Table:
    names = ("folder", "split", "name", "samples", "bytes")
    return pa.table({name: [row[number] for row in rows] for number, name in enumerate(names)})


MEDIA = pa.table({"kind": ["video"] * 3, "split": ["train"] * 3, "timestamps": [[0.0] * 4, [0.0] * 1200, [0.0]]})


def card(previous: str = "", rows=SHARDS) -> str:
    media = MEDIA if rows[0][0] == "video" else MEDIA.slice(0, 0)
    return render_dataset_card(RECORD, shard_table(rows), media, previous)


def configs(text: str) -> list:
    """The configs as huggingface_hub reads them."""
    return DatasetCard(text).data.to_dict()["configs"]


def test_each_folder_is_a_config_and_one_the_default():
    assert configs(card()) == [
        {"config_name": "video", "data_files": [{"split": "train", "path": "video/train-*.tar"}], "default": True},
        {
            "config_name": "dialogue",
            "data_files": [
                {"split": "train", "path": "dialogue/train-*.tar"},
                {"split": "val", "path": "dialogue/val-*.tar"},
            ],
        },
    ]
    texts = configs(card(rows=SHARDS[1:2]))
    assert [(config["config_name"], config["default"]) for config in texts] == [("dialogue", True)]


def test_the_card_counts_and_says_how_it_was_built():
    text = card()
    assert "| video | train | 2 | 3 | 1,205 | 30,720 |" in text
    assert "| dialogue | val | 1 | 1 | 0 | 10,240 |" in text
    assert "| `frames.sampler` | dynamic\\_fps1 |" in text
    assert "| a\\|b&lt;script&gt; # no | first:50% | 4 | 3 | 3 | 1,200 | 30,000 |" in text
    assert "secret" not in text and "nested" not in text and "`limit`" not in text
    assert "license" not in DatasetCard(text).data.to_dict(), "it is the user's to state"
    assert card() == text
    limited = {**RECORD, "specification": {**RECORD["specification"], "limit": 20}}
    assert "| `limit` | 20 |" in render_dataset_card(limited, shard_table(), MEDIA)


@pytest.mark.parametrize(
    ("folder", "more", "types", "cast", "frames"),
    [
        ("video", {}, "Video, ", 'rows = rows.cast_column("mp4", Video(decode=False))\n', "8"),
        ("image", {}, "Image, ", 'rows = rows.cast_column("jpg", Image(decode=False))\n', "8"),
        ("dialogue", {}, "", "", "8"),
        ("video", {"compat": "published"}, "Video, ", 'rows = rows.cast_column("mp4", Video(decode=False))\n', "None"),
    ],
)
def test_its_example_leaves_members_undecoded(folder, more, types, cast, frames):
    record = {**RECORD, "specification": {**RECORD["specification"], **more}}
    text = render_dataset_card(record, shard_table([(folder, "val", "val-000000.tar", 1, 10240)]), MEDIA.slice(0, 0))
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith(f"from datasets import {types}load_dataset\n")
    read = f"sample = read_members(next(iter(rows)), frames={frames})\n"
    assert f'"{folder}", split="val", streaming=True)\n{cast}{read}' in code
    assert f'ShardDataset("hf://datasets/OWNER/NAME", frames={frames})' in code
    assert "\npip install framestream" in text and "(https://github.com/framestream/framestream)" in text


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_the_user_wrote_stays_when_shards_are_added(newline, tmp_path):
    first = card(rows=SHARDS[:1])
    own = first.replace("---\n", "---\n# mine\nlicense: cc-by-4.0\n", 1).replace("Describe the data here", "My videos")
    own = (
        own.replace("configs:", "tags:\n- first\nconfigs:").replace("\n---\n", "\nlanguage: [en]\n---\n")
        + "\nThe end.\n"
    )
    (tmp_path / CARD_FILE).write_bytes(own.replace("\n", newline).encode())
    write_dataset_card(tmp_path, RECORD, shard_table(), MEDIA)
    text = (tmp_path / CARD_FILE).read_text()
    assert configs(text) == configs(card())
    data = DatasetCard(text).data.to_dict()
    assert (data["license"], data["tags"], data["language"]) == ("cc-by-4.0", ["first"], ["en"])
    assert "# mine\n" in text and "My videos" in text and text.endswith(END + "\n\nThe end.\n")
    assert (text.count(BEGIN), text.count("## Contents")) == (1, 1)
    write_dataset_card(tmp_path, RECORD, shard_table(), MEDIA)
    assert (tmp_path / CARD_FILE).read_text() == text


@pytest.mark.parametrize("previous", ["# Mine\n\nText.\n", "---\nlicense: mit\n---\n# Mine\n\nText.\n"])
def test_a_card_without_markers_is_the_users_own(previous):
    text = card(previous)
    assert configs(text) == configs(card())
    assert "# Mine\n\nText.\n\n" + BEGIN in text and "Describe the data" not in text
    assert ("license: mit\n" in text) == ("license" in previous)


@pytest.mark.parametrize(
    ("previous", "reason"),
    [
        ("---\nlicense: [\n---\ntext", "is not valid YAML"),
        ("---\n- a\n---\ntext", "is not a list of fields"),
        ("---\n{configs: 3}\n---\ntext", "is not a list of fields"),
        (f"text\n{BEGIN}\nmore", "once each"),
        (f"text\n{END}\n{BEGIN}\nmore", "once each"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}", "once each"),
    ],
)
def test_a_card_that_cannot_be_kept_stays_as_it_is(previous, reason, tmp_path, caplog):
    with pytest.raises(CardError, match=reason):
        card(previous)
    (tmp_path / CARD_FILE).write_text(previous)
    write_dataset_card(tmp_path, RECORD, shard_table(), MEDIA)
    assert (tmp_path / CARD_FILE).read_text() == previous
    assert f"{tmp_path / CARD_FILE}: " in caplog.text and reason in caplog.text


@pytest.mark.parametrize(
    ("data", "reason"), [(b"\xff", "is not UTF-8"), (b" " * (MAX_CARD_BYTES + 1), "has over"), (None, "regular file")]
)
def test_other_files_under_its_name_stay(data, reason, tmp_path, caplog):
    target = tmp_path / "elsewhere"
    target.write_text("private")
    if data is None:
        (tmp_path / CARD_FILE).symlink_to(target)
    else:
        (tmp_path / CARD_FILE).write_bytes(data)
    write_dataset_card(tmp_path, RECORD, shard_table(), MEDIA)
    assert reason in caplog.text
    assert target.read_text() == "private"
    assert data is None or (tmp_path / CARD_FILE).read_bytes() == data


LICENSED = ("---\n", "---\nlicense: mit\n", 1)


def test_cards_are_merged_unless_both_were_edited():
    old, new = card(rows=SHARDS[:1]), card()
    assert merge_cards(new, "") == merge_cards(new, old) == new
    assert merge_cards(new, old.replace(*LICENSED)) == new.replace(*LICENSED)
    assert merge_cards(new, "---\nlicense: mit\n---\n") == card("---\nlicense: mit\n---\n"), "as the hub makes it"
    assert merge_cards(new.replace(*LICENSED), old) == new.replace(*LICENSED)
    assert merge_cards(new.replace(*LICENSED), old.replace(*LICENSED)) == new.replace(*LICENSED)
    with pytest.raises(CardError, match="edited here and there"):
        merge_cards(new.replace(*LICENSED), old + "The end.\n")
    with pytest.raises(CardError, match="is not valid YAML"):
        merge_cards(new, "---\nlicense: [\n---\n")
