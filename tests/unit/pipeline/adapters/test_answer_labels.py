"""Tokens of answers get labels, whatever the answers say and however long the media before them become."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.adapters.answer_labels import IGNORED, answer_spans, with_labels

MEDIA = "@"  #: stands for a media item in a text


def render(messages) -> str:
    """A template like that of Qwen."""
    return "".join(f"<{message['role']}>{message['content'][0]['text']}<end>\n" for message in messages)


def dialogue(*texts: str) -> list[dict]:
    return [
        {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
        for n, text in enumerate(texts)
    ]


def features(text: str, sizes: list[int]) -> dict:
    """One token for each letter, and for the k-th media item as many as ``sizes[k]``."""
    expanded, replaced, sizes = "", [], list(sizes)
    for place, letter in enumerate(text):
        new = MEDIA * sizes.pop(0) if letter == MEDIA else letter
        if letter == MEDIA:
            replaced.append({"span": (place, place + 1), "new_span": (len(expanded), len(expanded) + len(new))})
        expanded += new
    return {
        "input_ids": torch.tensor([[ord(letter) for letter in expanded]]),
        "offset_mapping": [[(n, n + 1) for n in range(len(expanded))]],
        "text_replacement_offsets": [replaced],
    }


words = st.text("ab<>end\n ", max_size=8)


@given(
    turns=st.lists(st.tuples(st.sampled_from(["", MEDIA, MEDIA * 2]), words, words), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_labels_are_the_answers(turns, data):
    texts = [part for mark, asked, said in turns for part in (mark + asked, said)]
    messages = dialogue(*texts)
    text = render(messages)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=text.count(MEDIA), max_size=text.count(MEDIA)))
    made = with_labels(features(text, sizes), [answer_spans(messages, text, render)])
    labels = made["labels"][0]
    learned = "".join(chr(token) for token in labels[labels != IGNORED].tolist())
    assert learned == "".join(f"{said}<end>" for _, _, said in turns)
    assert (made["input_ids"][0][labels != IGNORED] == labels[labels != IGNORED]).all()
    assert made.keys() == {"input_ids", "labels"}


@pytest.mark.parametrize("kept", [slice(0, -2), slice(0, 0), slice(26, None)])
def test_a_row_that_is_cut_is_refused(kept):
    """At its end, at both, and at its beginning, as tokenizers with ``truncation_side="left"`` do."""
    messages = dialogue("Hi", "Ho", "Hi", "Hu")
    text = render(messages)
    made = features(text, [])
    places = made["offset_mapping"][0][kept]
    made["offset_mapping"] = [[*places, *[(0, 0)] * (len(text) - len(places))]]
    with pytest.raises(ValueError, match=f"row 0 of a batch is cut to {len(places)} tokens"):
        with_labels(made, [answer_spans(messages, text, render)])


def test_a_row_that_is_cut_between_answers_is_whole():
    messages = dialogue("Hi", "Ho", "Hi")
    text = render(messages)
    made = features(text, [])
    made["offset_mapping"] = [[*made["offset_mapping"][0][:-6], *[(0, 0)] * 6]]
    labels = with_labels(made, [answer_spans(messages, text, render)])["labels"][0]
    assert "".join(chr(token) for token in labels[labels != IGNORED].tolist()) == "Ho<end>"


def test_a_template_that_changes_earlier_turns_is_refused():
    def forgetful(messages) -> str:
        return render([*dialogue(*["..."] * (len(messages) - 1)), *messages[-1:]])

    messages = dialogue("Hi", "Ho", "He", "Hu")
    with pytest.raises(ValueError, match="template"):
        answer_spans(messages, forgetful(messages), forgetful)
