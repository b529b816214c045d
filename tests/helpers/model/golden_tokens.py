"""The golden token ids and labels, and the chat templates that must produce them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from framestream.pipeline.config.preprocessing import TextConfig
from framestream.pipeline.tokenization.chat_template import (
    IMAGE_PLACEHOLDER,
    ChatTemplate,
    turn_text,
)
from tests.helpers.golden_data import GOLDEN, TOKENIZER, json_lines, present

HERE = present("tokens_labels/tokenizer/tokenizer.json", "tokens_labels/tokenizer/tokenizer_config.json")


def conversation(template: str = "qwen_2", folder: Path = TOKENIZER, **settings) -> ChatTemplate:
    return ChatTemplate(TextConfig(tokenizer=str(folder), template=template, **settings))


FOLDER = GOLDEN / "tokens_labels" / "tokenizer"

ROWS = json_lines("tokens_labels/cases.jsonl") if HERE else []


def encode(row: dict, turns: list[dict], fetch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels. Skip the check that placeholders and media agree, as the published code does."""
    coder = conversation(row["version"], FOLDER)
    placeholders = sum(turn_text(turn).count(IMAGE_PLACEHOLDER) for turn in turns)
    kinds = [] if row["media"] == "text" else [row["media"]] * max(placeholders, 1)
    return coder.tokenize([coder.segments(turns, kinds, [row["time_message"]] * len(kinds), fetch)])[0]
