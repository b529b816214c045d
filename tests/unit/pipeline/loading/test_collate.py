"""Rows compared with the published collator, and inputs on which the published model fails."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from framestream.pipeline import build_loader
from framestream.pipeline.annotations.normalize import AnnotationError, normalize
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.config.model import TOKENS_PER_TILE
from framestream.pipeline.config.preprocessing import SAMPLERS, TextConfig
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.sampling import check_count
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.helpers.corpora.small_root import Root, manifest, turns
from tests.helpers.golden_data import json_file
from tests.helpers.model.golden_tokens import FOLDER, ROWS, encode

ENCODED = {row["case"]: row for row in ROWS if "input_ids" in row}
COLLATED = [
    pytest.param(rows, id=str(rows["model_max_length"]))
    for rows in json_file("tokens_labels/collate.json") or []
    if ENCODED.keys() >= {*rows["cases"]}
]
PACKED = [rows for rows in COLLATED if any(ENCODED[case]["media"] == "text" for case in rows.values[0]["cases"])]
ODD = json_file("multimodal_sequence/odd_inputs.json") or []
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


def text(row: list[int], length: int) -> list[int]:
    """A golden row less its right padding; a mark's label is IGNORE with us from the start."""
    return [IGNORE_INDEX if value == IMAGE_TOKEN_INDEX else value for value in row[:length]]


@pytest.mark.parametrize("rows", COLLATED)
def test_golden_collate(rows):
    limit, pad = rows["model_max_length"], ChatTemplate(TextConfig(tokenizer=str(FOLDER))).tokenizer.pad_token_id
    assert len(rows["image_sizes"]) == len(rows["modalities"]) == len(rows["cases"])  # handed through, one a row
    for number, case in enumerate(rows["cases"]):
        ids, labels = (values[:limit] for values in encode(ENCODED[case], ENCODED[case]["conversation"]))
        theirs, width = rows["input_ids"][number], len(rows["input_ids"][0])
        assert ids.tolist() == theirs[: len(ids)] and theirs[len(ids) :] == [pad] * (width - len(ids)), case
        assert labels.tolist() == text(rows["labels"][number], len(ids)), case
        assert rows["labels"][number][len(ids) :] == [IGNORE_INDEX] * (width - len(ids)), case
        assert rows["attention_mask"][number] == [int(token != pad) for token in theirs], case


@pytest.mark.parametrize("rows", PACKED)
def test_golden_collate_packed(tmp_path, rows):
    """The text cases through shards and loader: golden ids one after the other.

    Texts with control tokens are left out: the golden ids have them as control tokens, the loader as characters.
    """
    made, wanted = Root(tmp_path), {}
    for case, ids, labels, mask in zip(
        *(rows[name] for name in ("cases", "input_ids", "labels", "attention_mask")), strict=True
    ):
        row = ENCODED[case]
        if row["media"] != "text" or "<|" in json.dumps(row["conversation"]):
            continue
        key = made.dialogues[made.dialogue(row["conversation"])]["key"]
        length = min(len(row["input_ids"]), rows["model_max_length"])
        assert mask[length:] == [0] * (len(mask) - length)  # what is left is text, whatever the mask says of it
        wanted[key] = ids[:length], [IGNORE_INDEX, *text(labels, length)[1:]]
    settings = {"text__tokenizer": str(FOLDER), "text__max_tokens": rows["model_max_length"]}
    loader = build_loader(manifest(made.write(), batching={"global_batch": 99, "row_multiple": 1}, **settings))
    batches = [batch for batch in loader if batch.keys]
    assert sorted(key for batch in batches for key in batch.keys) == sorted(wanted)
    for batch in batches:
        ids, labels = ([value for key in batch.keys for value in wanted[key][part]] for part in (0, 1))
        assert batch.input_ids.tolist() == ids and batch.labels.tolist() == labels
        assert batch.position_ids.tolist() == [
            position for key in batch.keys for position in range(len(wanted[key][0]))
        ]
        assert np.diff(batch.cu_seqlens).tolist() == [len(wanted[key][0]) for key in batch.keys]
        assert ((batch.token_weight > 0) == (batch.labels != IGNORE_INDEX)).all()


def test_a_row_has_no_mask_that_could_hide_text():
    assert not [name for name in Batch.__dataclass_fields__ if "mask" in name]


def first_number(what: str) -> int:
    """The first number of a golden description, in digits or in letters."""
    return next(
        int(word) if word.isdigit() else NUMBERS[word]
        for word in re.findall(r"[a-z0-9]+", what)
        if word.isdigit() or word in NUMBERS
    )


@pytest.mark.parametrize("odd", [pytest.param(odd, id=odd["what"]) for odd in ODD if "error" in odd])
def test_golden_odd_inputs_no_whole_clips(tmp_path, odd):
    """A video that clips do not divide: such a setting is refused, and such a source is shown in whole clips."""
    count = first_number(odd["what"])
    with pytest.raises(ManifestError, match=f"frames.max: {count} is not a multiple of clip_frames"):
        manifest(tmp_path, frames__min=count, frames__max=count)
    with pytest.raises(ValueError, match=f"{count} frames are not a multiple of 4"):
        check_count(count, 4)
    made = Root(tmp_path)
    made.dialogue(turns("<image>\nWhat?", "This."), [made.video(count, count)])
    folder = made.write()
    for sampler in (*SAMPLERS, "fps1", "fps2", "fps30"):
        (row,) = (row for row in build_loader(manifest(folder, frames__sampler=sampler, frames__min=4)) if row.keys)
        assert row.clips.shape[0] >= 1 and row.clips.shape[1] == 4
        assert int((row.input_ids == IMAGE_TOKEN_INDEX).sum()) == 64 * len(row.clips)


@pytest.mark.parametrize("odd", [pytest.param(odd, id=odd["what"]) for odd in ODD if "rows_out" in odd])
def test_golden_odd_inputs_no_row_is_dropped(tmp_path, odd):
    """Fewer kinds of media than rows drop rows there. Here a media item has its kind, every dialogue its row."""
    count = first_number(odd["what"])
    assert odd["rows_out"] < count
    made = Root(tmp_path)
    for _ in range(count):
        made.dialogue(turns("<image>\nWhat?", "This."), [made.still(20, 20)])
    batching = {"global_batch": count, "row_multiple": 1}
    rows = [len(row.keys) for row in build_loader(manifest(made.write(), batching=batching))]
    assert sum(rows) == count
    kinds = ["image"] * odd["rows_out"]
    asked = turns("<image>" * count, "This.")
    with pytest.raises(ValueError, match=f"{count} <image> marks are left for {odd['rows_out']} media"):
        ChatTemplate(manifest(tmp_path).text).encode(asked, kinds, [""] * len(kinds))


@pytest.mark.parametrize("odd", [pytest.param(odd, id=odd["what"]) for odd in ODD if "length_out" in odd])
def test_golden_odd_inputs_no_media_item_is_repeated(tmp_path, odd):
    """With too few images the reference repeats the last. Here the sample goes to the ledger, and no row has it."""
    count = first_number(odd["what"])
    assert odd["second_place_repeats_first"] and 0 <= odd["length_out"] - count * TOKENS_PER_TILE < TOKENS_PER_TILE
    conversation = turns("<image>" * count, "This.")
    with pytest.raises(AnnotationError, match=f"{count} <image> or <video> marks for 1 media") as refused:
        normalize({"image": ["a.png"], "conversations": conversation}, EntryConfig(annotation="a.json"), 0)
    assert refused.value.reason == "placeholder_mismatch"
    made = Root(tmp_path)
    made.dialogue(conversation, [made.still(20, 20)])
    with pytest.raises(ShardsError, match=f"1 are excluded, the first because {count} <image> marks"):
        build_loader(manifest(made.write()))
    made = Root(tmp_path / "enough")
    made.dialogue(conversation, [made.still(20, 20) for _ in range(count)])
    (row,) = (row for row in build_loader(manifest(made.write())) if row.keys)
    assert int((row.input_ids == IMAGE_TOKEN_INDEX).sum()) == count * TOKENS_PER_TILE
