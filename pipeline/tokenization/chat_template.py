"""Convert dialogues to token ids and labels: the published preprocessing and the templates ``plain`` and ``qwen_2``.

The preprocessing applies to dialogues with media. If a turn has one ``<image>`` mark, it moves to the front. The time
message of a video is inserted after its mark. A noise string of one data set is removed. A template then makes
segments, which are tokenized separately:

* ``qwen_2``: a system turn, then every turn as ``<|im_start|>ROLE\\nTEXT<|im_end|>\\n``. Assistant turns get labels,
  including their header. As published, a lone newline, ``<|im_start|>`` and ``<|im_end|>`` in prompts get labels too;
  ``text.mask_prompt_markers`` turns that off. An assistant turn at the beginning of a dialogue is removed. A system
  turn at the beginning replaces the default one.
* ``plain`` (stage 1): two turns. The human turn is reduced to its mark; the caption and a newline get labels.

Each mark becomes one ``IMAGE_TOKEN_INDEX``. The loader repeats it for every visual token.

``fetch`` reproduces two faults of the published code (``compat: published``). That code edits a dialogue in place, so
that the preprocessing runs for the k-th time when the dialogue is fetched for the k-th time. A ``qwen_2`` dialogue
fails unless its first turn is ``from`` human or gpt. ``fetch`` is k to reproduce this, and 0 for the intended behavior.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.preprocessing import TextConfig
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX

IMAGE_PLACEHOLDER = "<image>"  #: mark of a media item in a text, also of a video
NOISE = "QA_GT_caption_based_noisy"  #: string that the published code removes
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Turns = Sequence[dict]

#: a Hugging Face fast tokenizer; it is not imported here because that takes seconds
Tokenizer = Any

#: of each segment: its texts, with one media item between each two, and whether all its tokens get labels
TokenSegments = list[tuple[list[str], bool]]


def load_tokenizer(name: str) -> Tokenizer:
    """Load a Hugging Face fast tokenizer from a folder or by hub name; code that comes with it is never run.

    Raises:
        ManifestError: it cannot be loaded, or is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    local = name.startswith((".", "/")) or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if local and not path.is_dir():  # it looks like a folder, so the hub is not asked
        raise ManifestError(f"text.tokenizer: {name} is not a folder here")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        found = "" if Path(name).is_dir() else " (no such folder here)"
        reason = " ".join(str(error).split())[:200]
        raise ManifestError(f"text.tokenizer: cannot load a tokenizer from {name!r}{found}: {reason}") from None
    if not tokenizer.is_fast:
        raise ManifestError(f"text.tokenizer: {name!r} has no tokenizer.json; convert it to a fast tokenizer first")
    return tokenizer


def turn_role(turn: dict) -> str:
    """Return ``user``, ``assistant``, ``system``, or any other name unchanged (``function``; labeled, as published)."""
    name = turn.get("from", turn.get("role"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"one of the turns has no role: {str(turn)[:80]}")
    return ROLES.get(name, name)


def turn_text(turn: dict) -> str:
    """Return the text of a turn."""
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise ValueError(f"one of the turns has no text: {str(turn)[:80]}")
    return text


def preprocess_multimodal(turns: Turns, messages: Sequence[str]) -> list[dict]:
    """Apply the published preprocessing; ``messages[k]`` is inserted after the k-th mark of the dialogue."""
    remaining = iter(messages)
    processed = []
    for turn in turns:
        text = turn_text(turn)
        if text.count(IMAGE_PLACEHOLDER) == 1 and not text.startswith(IMAGE_PLACEHOLDER):
            text = f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
        head, *tails = text.split(IMAGE_PLACEHOLDER)
        for tail in tails:
            message = next(remaining, "").rstrip()
            head += IMAGE_PLACEHOLDER + (f"{message} " if message else "") + tail
        processed.append({**turn, "value" if "value" in turn else "content": head.replace(NOISE, "")})
    return processed


def repeat_preprocessing(turns: Turns, messages: Sequence[str], template: str, fetch: int) -> list[dict]:
    """Apply the preprocessing ``fetch`` times; in between, template ``plain`` reduces the first turn to its mark."""
    for _ in range(fetch - 1):
        turns = preprocess_multimodal(turns, messages)
        if template == "plain":
            turns = [{**turns[0], "value": IMAGE_PLACEHOLDER}, *turns[1:]]
    return preprocess_multimodal(turns, messages)


def split_last_answer(turns: Turns) -> tuple[list[dict], str]:
    """Return the turns up to the last human turn with an answer, and the answer; ValueError if no turn is answered."""
    for i in range(len(turns) - 2, -1, -1):
        if turn_role(turns[i]) == "user" and turn_role(turns[i + 1]) == "assistant":
            return list(turns[: i + 1]), turn_text(turns[i + 1])
    raise ValueError("no human turn is followed by an answer")


class ChatTemplate:
    """Encodes dialogues under the text settings of one manifest."""

    def __init__(self, text: TextConfig, tokenizer: Tokenizer | None = None) -> None:
        self.text = text
        self.tokenizer = load_tokenizer(text.tokenizer) if tokenizer is None else tokenizer
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        markers = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        if text.template == "qwen_2" and (len(newline) != 1 or None in markers or markers[0] == markers[1]):
            raise ManifestError(f"text.tokenizer: {text.tokenizer!r} lacks <|im_start|>, <|im_end|> or a newline token")
        labeled = [] if text.template == "plain" or text.mask_prompt_markers else [*newline, *markers]
        self._labeled_ids = np.array(labeled, dtype=np.int32)  # they get labels wherever they are

    def encode(
        self, turns: Turns, kinds: Sequence[str], messages: Sequence[str], fetch: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode one dialogue as ids and labels, int32 (n,); each media item is one id, with label ``IGNORE_INDEX``.

        Args:
            turns: ``{"from", "value"}`` or ``{"role", "content"}``, in order.
            kinds: ``image`` or ``video`` of every media item, in order of use; empty for text.
            messages: the time message of every media item, empty for images.
            fetch: 0, or which fetch of the published code to reproduce, from 1.

        Raises:
            ValueError: the turns do not fit the template, or the marks do not fit the media.
        """
        ids, labels = self.tokenize([self.segments(turns, kinds, messages, fetch)])[0]
        self.check_placeholders(ids, len(kinds))
        return ids, labels

    def prompt(self, turns: Turns, kinds: Sequence[str], messages: Sequence[str]) -> np.ndarray:
        """Encode turns that end with a question, up to the start of the answer, as ids, int32 (n,)."""
        if self.text.template == "plain":
            turns = [*turns, {"from": "gpt", "value": ""}]
            segments = self.segments(turns, kinds, messages)[:1]
        else:
            segments = [*self.segments(turns, kinds, messages), (["<|im_start|>assistant\n"], True)]
        ids, _ = self.tokenize([segments])[0]
        self.check_placeholders(ids, len(kinds))
        return ids

    def answer_ids(self, text: str) -> list[int]:
        """Encode an answer as in training: all that follows a prompt, with the end token."""
        if self.text.template == "plain":
            return self._ids([f"{text}\n"])[0]
        header, complete = self._ids(["<|im_start|>assistant\n", f"<|im_start|>assistant\n{text}<|im_end|>"])
        return complete[len(header) :]

    def check_placeholders(self, ids: np.ndarray, count: int) -> None:
        """Raise ValueError unless there is one mark for each of ``count`` media."""
        marks = int((ids == IMAGE_TOKEN_INDEX).sum())
        if marks != count:
            raise ValueError(
                f"{marks} {IMAGE_PLACEHOLDER} marks are left for {count} media under template {self.text.template}"
            )

    def segments(self, turns: Turns, kinds: Sequence[str], messages: Sequence[str], fetch: int = 0) -> TokenSegments:
        """Split a dialogue into segments, and these at their marks; without media, a mark is ordinary text."""
        if not turns:
            raise ValueError("the dialogue has no turns")
        plain = self.text.template == "plain"
        if fetch and not plain and turns[0].get("from") not in ("human", "gpt"):
            raise ValueError("with compat: published the first of the turns is from human or gpt")
        turns = turns if plain else self._normalize_roles(turns)
        if kinds:
            turns = repeat_preprocessing(turns, messages, self.text.template, max(fetch, 1))
        segments = self._plain(turns) if plain else self._qwen_2(turns)
        return [(text.split(IMAGE_PLACEHOLDER) if kinds else [text], labeled) for text, labeled in segments]

    def _plain(self, turns: Turns) -> list[tuple[str, bool]]:
        if len(turns) != 2 or IMAGE_PLACEHOLDER not in turn_text(turns[0]):
            raise ValueError(f"template plain needs two turns, the first with an {IMAGE_PLACEHOLDER} mark")
        return [(IMAGE_PLACEHOLDER, False), (f"{turn_text(turns[1])}\n", True)]

    def _normalize_roles(self, turns: Turns) -> Turns:
        """Return the used turns: a system turn first, and no assistant turn right after it."""
        has_system = turn_role(turns[0]) == "system"
        system = turns[0] if has_system else {"from": "system", "value": self.text.system}
        rest = turns[1:] if has_system else turns
        return [system, *(rest[1:] if rest and turn_role(rest[0]) == "assistant" else rest)]

    def _qwen_2(self, turns: Turns) -> list[tuple[str, bool]]:
        pairs = [(turn_role(turn), turn_text(turn)) for turn in turns]
        return [(f"<|im_start|>{role}\n{text}<|im_end|>\n", role not in ("system", "user")) for role, text in pairs]

    def tokenize(self, dialogues: Iterable[TokenSegments]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode many dialogues as ids and labels, int32 (n,), in one call of the tokenizer."""
        dialogues = list(dialogues)
        pieces = [piece for segments in dialogues for texts, _ in segments for piece in texts]
        encoded = iter(self._ids(pieces))
        return [self._join(segments, encoded) for segments in dialogues]

    def _ids(self, pieces: list[str]) -> list[list[int]]:
        if not pieces:
            return []
        return self.tokenizer(
            pieces,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _join(self, segments: TokenSegments, encoded: Iterator[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Join the ids of one dialogue, which are the next of ``encoded``, and make its labels."""
        joined: list[int] = []
        labeled: list[bool] = []
        for texts, all_labeled in segments:
            start = len(joined)
            joined += next(encoded)
            for _ in texts[1:]:
                joined.append(IMAGE_TOKEN_INDEX)
                joined += next(encoded)
            labeled += [all_labeled] * (len(joined) - start)
        ids = np.array(joined, dtype=np.int32)
        has_label = (np.array(labeled, dtype=bool) | np.isin(ids, self._labeled_ids)) & (ids != IMAGE_TOKEN_INDEX)
        return ids, np.where(has_label, ids, np.int32(IGNORE_INDEX))


def build_chat_template(manifest: Manifest) -> ChatTemplate:
    """Load the tokenizer and the template of a manifest.

    Raises:
        ManifestError: the tokenizer cannot be loaded, or has more ids than the language model.
    """
    template, size = ChatTemplate(manifest.text), manifest.model.language_model.vocab_size
    if len(template.tokenizer) > size:
        raise ManifestError(
            f"model.language_model.vocab_size: {size} is fewer than the {len(template.tokenizer)} ids of "
            f"{manifest.text.tokenizer}; raise it, or name another tokenizer"
        )
    return template
