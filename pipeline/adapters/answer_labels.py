"""Labels for the answers of chats: which characters of a chat's text are answers, and which tokens these are.

The template is applied to the turns up to an answer, and to the same turns with two other answers, ``a`` and ``b``.
These two texts are equal up to where the answer begins. It ends, with the template's end of the turn, where the first
text ends. Nothing is searched in the text, so an answer may contain whatever the template writes. The processor then
says where it has put the tokens of media into the text, and where each token is.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

IGNORED = -100  #: label of tokens that are not learned, in transformers and PyTorch

Span = tuple[int, int]  #: first character of an answer in a text, and the one after its last


def answer_spans(
    messages: Sequence[dict[str, Any]], text: str, render: Callable[[Sequence[dict[str, Any]]], str]
) -> list[Span]:
    """Return where the answers are in the text of a chat, each with the end of its turn but without a last newline.

    Args:
        messages: of the chat.
        text: of all of them.
        render: returns the text of some messages, without the prompt for an answer.

    Raises:
        ValueError: the template writes earlier turns differently once others follow.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = messages[:number]
            others = [render([*before, {**message, "content": [{"type": "text", "text": word}]}]) for word in "ab"]
            start = len(os.path.commonprefix(others))
            through = render([*before, message]).rstrip("\n")
            if through[:start] != others[0][:start] or not text.startswith(through):
                raise ValueError(
                    "the processor's chat template changes turns when others follow, so the tokens of answers are not "
                    "known; use another template, or make labels in the trainer"
                )
            spans.append((start, len(through)))
    return spans


def with_labels(features: Any, spans: Sequence[Sequence[Span]]) -> Any:
    """Add ``labels``, int64 (rows, tokens), to a processor's features, and remove the offsets that tell them.

    Args:
        features: with ``offset_mapping``, (rows, tokens, 2), and ``text_replacement_offsets``.
        spans: of the answers of each row, in the text before media were put into it.

    Raises:
        ValueError: the processor has cut a row, at either end, so that a part of an answer is missing.
    """
    offsets = torch.as_tensor(features.pop("offset_mapping"))
    replaced = features.pop("text_replacement_offsets", None) or [[]] * len(offsets)
    labels = torch.full_like(features["input_ids"], IGNORED)
    for row, answers in enumerate(spans):
        present = offsets[row][offsets[row, :, 1] > offsets[row, :, 0]]  # without padding and tokens of no text
        begin, end = (int(present[:, 0].min()), int(present[:, 1].max())) if len(present) else (0, 0)
        ends = [part["span"][1] for part in replaced[row]]
        moved = [0] + [part["new_span"][1] - part["span"][1] for part in replaced[row]]
        for span in answers:
            first, stop = (place + moved[bisect_right(ends, place)] for place in span)
            inside = (offsets[row, :, 0] < stop) & (offsets[row, :, 1] > first)
            if first < stop and not (begin <= first and stop <= end):
                raise ValueError(
                    f"row {row} of a batch is cut to {len(present)} tokens and loses answers; raise max_length, do not "
                    f"truncate, or use joined=False if dialogues are joined"
                )
            labels[row][inside] = features["input_ids"][row][inside]
    features["labels"] = labels
    return features
