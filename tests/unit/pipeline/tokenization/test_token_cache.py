"""The token cache: its rows, when it is built, and the effect of a limit on length."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.tokenization.token_cache import TokenCache
from framestream.pipeline.tokenization.token_rows import DialogueTokenizer
from tests.helpers.corpora.small_root import Root, manifest, mixed_root, turns


def open_tokens(root, **over) -> TokenCache:
    made = manifest(root, **over)
    index = Index.open(made.shard_root)
    return TokenCache(index, made, ChatTemplate(made.text), MediaViews(index, made))


def refused(tokens: TokenCache) -> dict[int, str]:
    """Why each dialogue that cannot be used cannot, by row."""
    return {row: tokens.skip_reason(row) for row in np.flatnonzero(tokens.num_label_tokens == 0).tolist()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mixed_root(tmp_path_factory.mktemp("tokens"))


def test_rows_are_the_dialogues_one_by_one(root):
    tokens = open_tokens(root)
    made = manifest(root)
    index, chat_template = Index.open(made.shard_root), ChatTemplate(made.text)
    media_views = MediaViews(index, made)
    assert len(tokens.length) == len(index.dialogues)
    for row, dialogue in enumerate(index.dialogues.to_pylist()):
        views = media_views.views(dialogue["media"])
        ids, labels = chat_template.encode(
            json.loads(dialogue["conversations"]), [v.kind for v in views], [v.message for v in views]
        )
        got_ids, got_labels = tokens.get(row)
        assert got_ids.tolist() == ids.tolist()
        assert got_labels.tolist() == [IGNORE_INDEX, *labels.tolist()[1:]]
        assert tokens.num_label_tokens[row] == sum(label != IGNORE_INDEX for label in labels.tolist()[1:])
        assert tokens.clips[row] == sum(v.clips for v in views) and tokens.tiles[row] == sum(v.tiles for v in views)
        assert tokens.length[row] == sum(1 for i in ids if i != IMAGE_TOKEN_INDEX) + 64 * (
            tokens.clips[row] + tokens.tiles[row]
        )
    assert not refused(tokens) and not len(tokens.truncated)


def test_another_process_makes_the_same_rows(root):
    made = manifest(root)
    index = Index.open(made.shard_root)
    here = DialogueTokenizer(index, ChatTemplate(made.text), MediaViews(index, made), 0)
    there = pickle.loads(pickle.dumps(here))
    rows = len(index.dialogues)
    assert [batch.to_pylist() for batch in there(1, rows)] == [batch.to_pylist() for batch in here(1, rows)]


def test_built_once_and_again_for_other_settings(root, monkeypatch):
    first = open_tokens(root)
    with monkeypatch.context() as patched:
        patched.setattr(DialogueTokenizer, "__call__", lambda *_: pytest.fail("tokenized twice"))
        assert open_tokens(root, text__max_tokens=300, batching__global_batch=2).fingerprint == first.fingerprint
    others = {
        open_tokens(root, **over).fingerprint
        for over in (
            {"text__system": "Be brief."},
            {"text__mask_prompt_markers": True},
            {"frames__max": 16},
            {"frames__time_message": "long"},
            {"images__mode": "square"},
        )
    }
    assert len(others) == 5 and first.fingerprint not in others


def test_concurrent_builds_give_one_complete_file(tmp_path):
    folder = mixed_root(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: open_tokens(folder), range(4)))
    assert len({tokens.fingerprint for tokens in made}) == 1
    assert len(list((folder / "stage2" / "index").glob("tokens-*"))) == 1


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    folder = mixed_root(tmp_path)

    def fail(*_):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(DialogueTokenizer, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        open_tokens(folder)
    assert not list((folder / "stage2" / "index").glob("tokens-*"))


@pytest.fixture(scope="module")
def long_root(tmp_path_factory):
    made = Root(tmp_path_factory.mktemp("long"))
    video, image = made.video(20, 20), made.still(60, 60)
    words = "word " * 300
    made.dialogue(turns("Say it.", words))
    made.dialogue(turns("<image>\nSay it.", words), [video])
    made.dialogue(turns("Say it.", words, "<image>\nAnd now?", "Yes."), [image])
    made.dialogue(turns("<image>\nShort?", "Yes."), [video])
    made.dialogue(turns(words, "Yes."), [])
    made.dialogue(turns("<image> and <image>", "Yes."), [video])
    return made.write()


def test_text_over_the_limit_is_cut_and_media_never(long_root):
    limit = 260
    tokens, whole = open_tokens(long_root, text__max_tokens=limit), open_tokens(long_root, text__max_tokens=32_768)
    for row in (0, 1):
        ids, labels = tokens.get(row)
        full_ids, full_labels = whole.get(row)
        assert tokens.length[row] == limit < whole.length[row]
        assert len(ids) - (ids == IMAGE_TOKEN_INDEX).sum() + 128 * row == limit  # 8 frames, two clips, 128 tokens
        assert ids.tolist() == full_ids[: len(ids)].tolist() and labels.tolist() == full_labels[: len(ids)].tolist()
        assert tokens.num_label_tokens[row] == (np.array(labels) != IGNORE_INDEX).sum()
    assert tokens.truncated.tolist() == [0, 1, 4]
    assert tokens.skip_reason(1) == f"{whole.length[1]} tokens are more than text.max_tokens (260), and are cut to it"
    assert "cutting it would cut its media" in refused(tokens)[2]
    assert tokens.get(3)[0].tolist() == whole.get(3)[0].tolist()
    assert refused(tokens)[5].startswith("2 <image> marks are left for 1 media")
    assert sorted(refused(tokens)) == [2, 5] and sorted(refused(whole)) == [5]


def test_media_alone_over_the_limit_are_refused(long_root):
    tokens = open_tokens(long_root, text__max_tokens=100)
    assert {1, 2, 3} <= set(refused(tokens))
    assert tokens.length[0] == 100


def test_nothing_left_to_learn_is_refused(long_root):
    tokens = open_tokens(long_root, text__max_tokens=260, text__mask_prompt_markers=True)
    assert "nothing to learn" in refused(tokens)[4]


def test_over_length_refuse(long_root):
    tokens = open_tokens(long_root, text__max_tokens=260, text__over_length="refuse")
    assert sorted(refused(tokens)) == [0, 1, 2, 4, 5]
    assert refused(tokens)[0].endswith("tokens are more than text.max_tokens (260)")
    assert not len(tokens.truncated)
