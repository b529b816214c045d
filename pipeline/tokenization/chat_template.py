"""Conversations to token ids and labels: the published media step and the templates ``plain`` and ``qwen_2``.

The media step (dialogues with media only) moves a turn's only ``<image>`` mark to its front, puts the time message of a
video after its mark and removes a noise string of one data set. A template then makes segments, each tokenised by
itself:

* ``qwen_2``: a system turn, then every turn as ``<|im_start|>ROLE\\nTEXT<|im_end|>\\n``. Whole assistant turns are
  learned, header included. As published, a lone newline, ``<|im_start|>`` and ``<|im_end|>`` are learned in prompts
  too; ``text.mask_prompt_markers`` turns that off. A dialogue that begins with an assistant turn loses it; a first
  system turn takes the place of the default one.
* ``plain`` (stage 1): two turns; the human one is reduced to its mark, then the caption and a newline are learned.

Marks become the id ``IMAGE``, once per medium; the loader repeats it for every visual token.

``fetch`` brings back two faults of the published code (``compat: published``). It edits a dialogue in place, so that
the k-th time it is fetched the media step is made for the k-th time, and a qwen_2 dialogue fails unless its first turn
is ``from`` human or gpt. ``fetch`` is k there, and 0 for what was meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.preprocessing import TextConfig
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX

MARK = "<image>"
NOISE = "QA_GT_caption_based_noisy"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Turns = Sequence[dict]
TokenSegments = list[tuple[list[str], bool]]  # texts with a medium between each two, and whether all of it is learned


def load_tokenizer(name: str):
    """A Hugging Face fast tokenizer from a folder or hub name; never runs code that comes with it."""
    from transformers import AutoTokenizer

    path = Path(name)
    local = name.startswith((".", "/")) or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if local and not path.is_dir():  # a folder by its look: the hub is not asked for it
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


def role_of(turn: dict) -> str:
    """``user``, ``assistant``, ``system``, or another name as it stands (``function``; learned, as published)."""
    name = turn.get("from", turn.get("role"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"one of the turns has no role: {str(turn)[:80]}")
    return ROLES.get(name, name)


def text_of(turn: dict) -> str:
    """What the turn says."""
    text = turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise ValueError(f"one of the turns has no text: {str(turn)[:80]}")
    return text


def preprocess_multimodal(turns: Turns, messages: Sequence[str]) -> list[dict]:
    """Turns as the published media step leaves them; the k-th mark of the dialogue is followed by ``messages[k]``."""
    left = iter(messages)
    done = []
    for turn in turns:
        text = text_of(turn)
        if text.count(MARK) == 1 and not text.startswith(MARK):
            text = f"{MARK}\n{text.replace(MARK, '').strip()}".strip()
        head, *tails = text.split(MARK)
        for tail in tails:
            message = next(left, "").rstrip()
            head += MARK + (f"{message} " if message else "") + tail
        done.append({**turn, "value" if "value" in turn else "content": head.replace(NOISE, "")})
    return done


def reused_sample(turns: Turns, messages: Sequence[str], template: str, fetch: int) -> list[dict]:
    """Turns after ``fetch`` media steps, in between which template ``plain`` reduces the first turn to its mark."""
    for _ in range(fetch - 1):
        turns = preprocess_multimodal(turns, messages)
        if template == "plain":
            turns = [{**turns[0], "value": MARK}, *turns[1:]]
    return preprocess_multimodal(turns, messages)


def question_and_answer(turns: Turns) -> tuple[list[dict], str]:
    """The turns up to the last human one that is answered, and that answer; ValueError where there is none."""
    for i in range(len(turns) - 2, -1, -1):
        if role_of(turns[i]) == "user" and role_of(turns[i + 1]) == "assistant":
            return list(turns[: i + 1]), text_of(turns[i + 1])
    raise ValueError("no human turn is followed by an answer")


class ChatTemplate:
    """Encodes dialogues under one manifest's text settings."""

    def __init__(self, text: TextConfig, tokenizer=None) -> None:
        self.text = text
        self.tokenizer = load_tokenizer(text.tokenizer) if tokenizer is None else tokenizer
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        markers = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        if text.template == "qwen_2" and (len(newline) != 1 or None in markers or markers[0] == markers[1]):
            raise ManifestError(f"text.tokenizer: {text.tokenizer!r} lacks <|im_start|>, <|im_end|> or a newline token")
        learned = [] if text.template == "plain" or text.mask_prompt_markers else [*newline, *markers]
        self._learned = np.array(learned, dtype=np.int32)

    def encode(
        self, turns: Turns, kinds: Sequence[str], messages: Sequence[str], fetch: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, int32 (n,), of one dialogue; one ``IMAGE`` per medium, its label ``IGNORE``.

        Args:
            turns: ``{"from", "value"}`` or ``{"role", "content"}``, in order.
            kinds: ``image`` or ``video`` for every medium, in order of use; empty for text.
            messages: the time message of every medium, empty for stills.
            fetch: 0, or the number of the published code's fetch of the dialogue, from 1.

        Raises:
            ValueError: the turns do not fit the template, or the marks do not fit the media.
        """
        ids, labels = self.tokenize([self.segments(turns, kinds, messages, fetch)])[0]
        self.check_placeholders(ids, kinds)
        return ids, labels

    def prompt(self, turns: Turns, kinds: Sequence[str], messages: Sequence[str]) -> np.ndarray:
        """Ids, int32 (n,), of turns that end with a question, up to where the answer starts."""
        if self.text.template == "plain":
            turns = [*turns, {"from": "gpt", "value": ""}]
            segments = self.segments(turns, kinds, messages)[:1]
        else:
            segments = [*self.segments(turns, kinds, messages), (["<|im_start|>assistant\n"], True)]
        ids, _ = self.tokenize([segments])[0]
        self.check_placeholders(ids, kinds)
        return ids

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as it is learned: all that follows a prompt, with the token that ends it."""
        if self.text.template == "plain":
            return self._ids([f"{text}\n"])[0]
        head, whole = self._ids(["<|im_start|>assistant\n", f"<|im_start|>assistant\n{text}<|im_end|>"])
        return whole[len(head) :]

    def check_placeholders(self, ids: np.ndarray, kinds: Sequence[str]) -> None:
        """ValueError unless there is one mark for each medium."""
        marks = int((ids == IMAGE_TOKEN_INDEX).sum())
        if marks != len(kinds):
            raise ValueError(
                f"{marks} {MARK} marks are left for {len(kinds)} media under template {self.text.template}"
            )

    def segments(self, turns: Turns, kinds: Sequence[str], messages: Sequence[str], fetch: int = 0) -> TokenSegments:
        """Texts to be tokenised one by one, split at their marks; in a text-only dialogue a mark is a literal word."""
        if not turns:
            raise ValueError("the dialogue has no turns")
        plain = self.text.template == "plain"
        if fetch and not plain and turns[0].get("from") not in ("human", "gpt"):
            raise ValueError("with compat: published the first of the turns is from human or gpt")
        turns = turns if plain else self._spoken(turns)
        if kinds:
            turns = reused_sample(turns, messages, self.text.template, max(fetch, 1))
        segments = self._plain(turns) if plain else self._qwen_2(turns)
        return [(text.split(MARK) if kinds else [text], learned) for text, learned in segments]

    def _plain(self, turns: Turns) -> list[tuple[str, bool]]:
        if len(turns) != 2 or MARK not in text_of(turns[0]):
            raise ValueError(f"template plain needs two turns, the first with an {MARK} mark")
        return [(MARK, False), (f"{text_of(turns[1])}\n", True)]

    def _spoken(self, turns: Turns) -> Turns:
        """The turns that are used: a system turn first, and no assistant turn right after it."""
        first = role_of(turns[0]) == "system"
        system = turns[0] if first else {"from": "system", "value": self.text.system}
        rest = turns[1:] if first else turns
        return [system, *(rest[1:] if rest and role_of(rest[0]) == "assistant" else rest)]

    def _qwen_2(self, turns: Turns) -> list[tuple[str, bool]]:
        spoken = [(role_of(turn), text_of(turn)) for turn in turns]
        return [(f"<|im_start|>{role}\n{text}<|im_end|>\n", role not in ("system", "user")) for role, text in spoken]

    def tokenize(self, dialogues: Iterable[TokenSegments]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and labels, int32 (n,), of many dialogues in one call of the tokenizer."""
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

    def _join(self, segments: TokenSegments, encoded: Iterable[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        ids, learned = [], []
        for texts, whole in segments:
            start = len(ids)
            ids += next(encoded)
            for _ in texts[1:]:
                ids.append(IMAGE_TOKEN_INDEX)
                ids += next(encoded)
            learned += [whole] * (len(ids) - start)
        ids = np.array(ids, dtype=np.int32)
        keep = (np.array(learned, dtype=bool) | np.isin(ids, self._learned)) & (ids != IMAGE_TOKEN_INDEX)
        return ids, np.where(keep, ids, np.int32(IGNORE_INDEX))


def build_chat_template(manifest: Manifest) -> ChatTemplate:
    """The manifest's tokenizer and template.

    Raises:
        ManifestError: the tokenizer cannot be loaded, or the language model has no place for some of its ids.
    """
    made, size = ChatTemplate(manifest.text), manifest.model.language_model.vocab_size
    if len(made.tokenizer) > size:
        raise ManifestError(
            f"model.language_model.vocab_size: {size} is fewer than the {len(made.tokenizer)} ids of "
            f"{manifest.text.tokenizer}; raise it, or name another tokenizer"
        )
    return made
