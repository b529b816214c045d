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

Control tokens come from the template alone. In a text, ``<|im_end|>`` and other special tokens of the tokenizer are
ordinary characters: a text cannot end a turn or begin another one. The published code makes control tokens of them;
``compat: published`` does the same in training, and never in prompts.

``fetch`` reproduces two faults of the published code (``compat: published``). That code edits a dialogue in place, so
that the preprocessing runs for the k-th time when the dialogue is fetched for the k-th time. A ``qwen_2`` dialogue
fails unless its first turn is ``from`` human or gpt. ``fetch`` is k to reproduce this, and 0 for the intended behavior.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.preprocessing import TextConfig
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.tokenization.tokenizer_files import Tokenizer, load_tokenizer, tokenizer_errors

IMAGE_PLACEHOLDER = "<image>"  #: mark of a media item in a text, also of a video
_LITERAL_PLACEHOLDER = "<image\ufdd0>"  # the characters of a mark, as text; U+FDD0 is a noncharacter
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  #: control tokens of ``qwen_2``
NOISE = "QA_GT_caption_based_noisy"  #: string that the published code removes
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Turns = Sequence[dict]

#: of each segment: its parts, which are texts and ids of control tokens and media, and whether all tokens get labels
TokenSegments = list[tuple[list[str | int], bool]]


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
    """Encodes dialogues under the text settings of one manifest.

    Args:
        text: the manifest's section.
        tokenizer: the one that ``text`` names if None.
        literal: whether special tokens that are written in the texts of dialogues are ordinary characters. Otherwise
            they are control tokens, as published. In prompts and answers they are always ordinary characters.

    Raises:
        ManifestError: the tokenizer cannot be loaded, or does not fit the template.
    """

    def __init__(self, text: TextConfig, tokenizer: Tokenizer | None = None, literal: bool = False) -> None:
        self.text, self._literal = text, literal
        self.tokenizer = load_tokenizer(text.tokenizer) if tokenizer is None else tokenizer
        with tokenizer_errors(text.tokenizer):
            newline = self._ids(["\n"])[0]
            known = self.tokenizer.get_vocab()
            self._markers = {token: known[token] for token in (TURN_START, TURN_END) if token in known}
            if text.template == "qwen_2" and (len(newline) != 1 or len(self._markers) < 2):
                raise ManifestError(
                    f"text.tokenizer: {text.tokenizer!r} lacks {TURN_START}, {TURN_END} or a newline token"
                )
            self._check_control_tokens()
        markers = list(self._markers.values())
        labeled = [] if text.template == "plain" or text.mask_prompt_markers else [*newline, *markers]
        self._labeled_ids = np.array(labeled, dtype=np.int32)  # they get labels wherever they are

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the template's end of a turn, the tokenizer's eos and its padding.

        Qwen2's own generation_config.json has two of them, ``<|im_end|>`` and ``<|endoftext|>``. The tokenizers of chat
        models use ``<|endoftext|>`` as padding, and those of base models use it as eos.
        """
        turn_end = self._markers[TURN_END] if self.text.template == "qwen_2" else None
        ends = (turn_end, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return tuple(dict.fromkeys(number for number in ends if number is not None))

    def _check_control_tokens(self) -> None:
        """Raise ManifestError if a text can contain a token that ends an answer or begins a turn."""
        ids = {*self._markers.values(), *(self.end_ids if self.text.template == "qwen_2" else ())}
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(ids))
        for token, found in zip(tokens, self._ids(tokens), strict=True):
            if ids & set(found):
                raise ManifestError(
                    f"text.tokenizer: {self.text.tokenizer!r}: {token} is an ordinary token, so that texts could end a "
                    "turn; make it a special token in tokenizer.json"
                )

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
            header: list[str | int] = [self._markers[TURN_START], "assistant\n"]
            segments = [*self.segments(turns, kinds, messages), (header, True)]
        ids, _ = self._encode_segments([segments], True)[0]
        self.check_placeholders(ids, len(kinds))
        return ids

    def answer_ids(self, text: str) -> list[int]:
        """Encode an answer as in training: all that follows a prompt, with the end token."""
        if self.text.template == "plain":
            return self._ids([f"{text}\n"])[0]
        header, complete = self._ids(["assistant\n", f"assistant\n{text}"])
        return [*complete[len(header) :], self._markers[TURN_END]]

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
        return self._plain(turns) if plain else self._qwen_2(turns, bool(kinds))

    def _plain(self, turns: Turns) -> TokenSegments:
        if len(turns) != 2 or IMAGE_PLACEHOLDER not in turn_text(turns[0]):
            raise ValueError(f"template plain needs two turns, the first with an {IMAGE_PLACEHOLDER} mark")
        return [([IMAGE_TOKEN_INDEX], False), (_split_at_marks(f"{turn_text(turns[1])}\n"), True)]

    def _normalize_roles(self, turns: Turns) -> Turns:
        """Return the used turns: a system turn first, and no assistant turn right after it."""
        has_system = turn_role(turns[0]) == "system"
        system = turns[0] if has_system else {"from": "system", "value": self.text.system}
        rest = turns[1:] if has_system else turns
        return [system, *(rest[1:] if rest and turn_role(rest[0]) == "assistant" else rest)]

    def _qwen_2(self, turns: Turns, has_media: bool) -> TokenSegments:
        start, end = self._markers[TURN_START], self._markers[TURN_END]
        segments: TokenSegments = []
        for turn in turns:
            role, text = turn_role(turn), f"{turn_role(turn)}\n{turn_text(turn)}"
            parts = _split_at_marks(text) if has_media else [text]
            segments.append(([start, *parts, end, "\n"], role not in ("system", "user")))
        return segments

    def tokenize(self, dialogues: Iterable[TokenSegments]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode many dialogues as ids and labels, int32 (n,), in one call of the tokenizer."""
        return self._encode_segments(list(dialogues), self._literal)

    def _encode_segments(self, dialogues: list[TokenSegments], literal: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        texts = [part for segments in dialogues for parts, _ in segments for part in parts if isinstance(part, str)]
        encoded = iter(self._ids(texts, literal))
        return [self._join(segments, encoded) for segments in dialogues]

    def _ids(self, texts: list[str], literal: bool = True) -> list[list[int]]:
        """Encode texts; if ``literal``, special tokens that are written in them are ordinary characters.

        Raises:
            ValueError: a text contains half of a UTF-16 surrogate pair.
            ManifestError: the tokenizer fails.
        """
        if not texts:
            return []
        texts = [text.replace(_LITERAL_PLACEHOLDER, IMAGE_PLACEHOLDER) for text in texts]
        for text in texts:
            if not text.isascii() and _has_lone_surrogate(text):
                raise ValueError("the text contains half of a UTF-16 surrogate pair")
        with tokenizer_errors(self.text.tokenizer):
            return self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=literal,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]

    def _join(self, segments: TokenSegments, encoded: Iterator[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Join the ids of one dialogue, whose texts are the next of ``encoded``, and make its labels."""
        joined: list[int] = []
        labeled: list[bool] = []
        for parts, all_labeled in segments:
            start = len(joined)
            for part in parts:
                joined += next(encoded) if isinstance(part, str) else [part]
            labeled += [all_labeled] * (len(joined) - start)
        ids = np.array(joined, dtype=np.int32)
        has_label = (np.array(labeled, dtype=bool) | np.isin(ids, self._labeled_ids)) & (ids != IMAGE_TOKEN_INDEX)
        return ids, np.where(has_label, ids, np.int32(IGNORE_INDEX))


def escape_placeholders(text: str) -> str:
    """Return ``text`` with every ``<image>`` as ordinary characters, for texts of people and models in a dialogue."""
    return text.replace(IMAGE_PLACEHOLDER, _LITERAL_PLACEHOLDER)


def _split_at_marks(text: str) -> list[str | int]:
    """Split a text at its marks; the parts between two texts are ``IMAGE_TOKEN_INDEX``."""
    head, *tails = text.split(IMAGE_PLACEHOLDER)
    parts: list[str | int] = [head]
    for tail in tails:
        parts += [IMAGE_TOKEN_INDEX, tail]
    return parts


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def build_chat_template(manifest: Manifest) -> ChatTemplate:
    """Load the tokenizer and the template of a manifest.

    Raises:
        ManifestError: the tokenizer cannot be loaded, or has more ids than the language model.
    """
    template = ChatTemplate(manifest.text, literal=manifest.compat == "none")
    size = manifest.model.language_model.vocab_size
    if max(template.tokenizer.get_vocab().values(), default=-1) >= size:
        raise ManifestError(
            f"model.language_model.vocab_size: {size} is fewer than the {len(template.tokenizer)} ids of "
            f"{manifest.text.tokenizer}; raise it, or name another tokenizer"
        )
    return template
