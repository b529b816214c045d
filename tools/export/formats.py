"""Forms of the annotation files of other trainers, and dialogues in these forms.

Each :class:`TrainerFormat` follows the documentation and the readers of its trainer:

* ``llava``: LLaVA-NeXT. ``conversations`` with ``from`` and ``value``, and ``image`` (a path or a list) or ``video``.
  The mark of a video is ``<image>``, too. Its reader has no system turns.
* ``qwen-vl``: qwen-vl-finetune of Qwen2.5-VL and Qwen3-VL. As above, but a video has the mark ``<video>``, and both
  kinds may be mixed. Its reader makes an answer of every turn that is not human, and finds marks in human turns alone.
* ``llamafactory``: LLaMA-Factory. ``messages`` with ``role`` and ``content``, ``images`` and ``videos``.
* ``sharegpt``: ``conversations`` with ``from`` and ``value``, ``images`` and ``videos``: the default of LLaMA-Factory.
* ``swift``: ms-swift. As ``llamafactory``, in JSON lines.

The readers of the last three are Hugging Face datasets, in which every row needs the same columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framestream.pipeline.annotations.normalize import IMAGE_PLACEHOLDER, ROLES, VIDEO_PLACEHOLDER
from framestream.pipeline.utils.records import load_json

MARKS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}  #: by kind of the media item
COLUMNS = {"image": "images", "video": "videos"}  #: by kind, in formats whose rows have the same columns

MediaFile = tuple[str, str]  #: kind, and path relative to the folder of the export


class NotExpressibleError(ValueError):
    """A trainer's format cannot say what a dialogue says; ``reason`` is one word for the count."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TrainerFormat:
    """Form of the annotation files of one trainer."""

    name: str
    extension: str  #: json (one list) or jsonl
    turns: str  #: field of the turns
    role: str  #: field of a turn
    text: str  #: field of a turn
    roles: Mapping[str, str]  #: human, gpt and, where the reader has it, system -> name
    columns: bool  #: media are in lists ``images`` and ``videos`` of every row, else in ``image`` and ``video``
    alternates: bool = False  #: human and gpt turns must alternate
    one_kind: bool = False  #: either one video, or images
    marks_in_answers: bool = True
    video_mark: str = VIDEO_PLACEHOLDER
    reserved: tuple[str, ...] = ()  #: texts that the reader takes for media
    dataset_info: bool = False  #: whether LLaMA-Factory's ``dataset_info.json`` is written

    def convert(self, key: str, conversations: str, media: Sequence[MediaFile]) -> dict[str, Any]:
        """Return one dialogue as a row of the annotation file, without columns for media that it does not have.

        A gpt turn before the first human turn is left out, and so are turns after the last answer: nothing is learned
        from them.

        Args:
            key: of the dialogue.
            conversations: JSON list of turns with ``from`` and ``value``, as in the index.
            media: in order of use.

        Raises:
            NotExpressibleError: the format cannot say it.
        """
        turns = _learned_turns(_parse_turns(conversations))
        self._check_roles([role for role, _ in turns])
        kinds = [kind for kind, _ in media]
        if self.one_kind and "video" in kinds and len(kinds) > 1:
            raise NotExpressibleError("media", "a dialogue with a video has no other media in this format")
        rows, remaining = [], iter(kinds)
        for role, text in turns:
            rows.append({self.role: self.roles[role], self.text: self._mark_media(role, text, remaining)})
        if rest := len(list(remaining)):
            raise NotExpressibleError("marks", f"{rest} of {len(kinds)} media have no {IMAGE_PLACEHOLDER} mark")
        return {"id": key, self.turns: rows, **self._media_fields(media)}

    def _check_roles(self, roles: Sequence[str]) -> None:
        if "system" in roles[1:]:
            raise NotExpressibleError("turns", "a system turn is not the first one")
        if "system" in roles and "system" not in self.roles:
            raise NotExpressibleError("system", "the reader of this format has no system turns")
        spoken = [role for role in roles if role != "system"]
        if self.alternates and any(role != ("human", "gpt")[number % 2] for number, role in enumerate(spoken)):
            raise NotExpressibleError("turns", "human and gpt turns do not alternate")

    def _mark_media(self, role: str, text: str, kinds: Iterator[str]) -> str:
        """Return a turn's text with the marks of this format; takes the kinds of its media from ``kinds``."""
        for literal in self.reserved:
            if literal in text:
                raise NotExpressibleError("text", f"a text has {literal}, which the reader takes for a media item")
        head, *tails = text.split(IMAGE_PLACEHOLDER)
        if tails and role != "human" and not self.marks_in_answers:
            raise NotExpressibleError("marks", f"a mark is in a {role} turn, where the reader does not look for it")
        for tail in tails:
            kind = next(kinds, None)
            if kind is None:
                raise NotExpressibleError("marks", f"more {IMAGE_PLACEHOLDER} marks than media")
            head += (self.video_mark if kind == "video" else IMAGE_PLACEHOLDER) + tail
        return head

    def _media_fields(self, media: Sequence[MediaFile]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for kind, column in COLUMNS.items():
            paths = [path for found, path in media if found == kind]
            if paths and self.columns:
                fields[column] = paths
            elif paths:
                fields[kind] = paths[0] if len(paths) == 1 else paths
        return fields

    def describe_files(self, files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return the content of ``dataset_info.json``.

        Args:
            files: split -> kinds of media in its file.
        """
        tags = {"role_tag": self.role, "content_tag": self.text}
        tags |= {"user_tag": self.roles["human"], "assistant_tag": self.roles["gpt"], "system_tag": "system"}
        return {
            split: {
                "file_name": f"{split}.{self.extension}",
                "formatting": "sharegpt",
                "columns": {"messages": self.turns} | {COLUMNS[kind]: COLUMNS[kind] for kind in kinds},
                "tags": tags,
            }
            for split, kinds in files.items()
        }


_SPEAKERS = {"human": "human", "gpt": "gpt"}
_CHAT = {"human": "user", "gpt": "assistant", "system": "system"}

#: formats by name
FORMATS = {
    form.name: form
    for form in (
        TrainerFormat(
            "llava",
            "json",
            "conversations",
            "from",
            "value",
            _SPEAKERS,
            columns=False,
            alternates=True,
            one_kind=True,
            video_mark=IMAGE_PLACEHOLDER,
        ),
        TrainerFormat(
            "llamafactory",
            "json",
            "messages",
            "role",
            "content",
            _CHAT,
            columns=True,
            alternates=True,
            reserved=(VIDEO_PLACEHOLDER, "<audio>"),
            dataset_info=True,
        ),
        TrainerFormat(
            "swift", "jsonl", "messages", "role", "content", _CHAT, columns=True, reserved=(VIDEO_PLACEHOLDER, "<img>")
        ),
        TrainerFormat(
            "qwen-vl",
            "json",
            "conversations",
            "from",
            "value",
            _SPEAKERS,
            columns=False,
            marks_in_answers=False,
            reserved=(VIDEO_PLACEHOLDER,),
        ),
        TrainerFormat(
            "sharegpt",
            "jsonl",
            "conversations",
            "from",
            "value",
            {**_SPEAKERS, "system": "system"},
            columns=True,
            alternates=True,
            reserved=(VIDEO_PLACEHOLDER, "<audio>"),
            dataset_info=True,
        ),
    )
}


def _parse_turns(conversations: str) -> list[tuple[str, str]]:
    """Return role (human, gpt or system) and text of every turn."""
    try:
        turns = [(ROLES[turn["from"]], turn["value"]) for turn in load_json(conversations)]
        if not all(isinstance(text, str) for _, text in turns):
            raise ValueError("the text of a turn is no text")
        json.dumps(turns, ensure_ascii=False).encode()
    except (ValueError, KeyError, TypeError) as error:
        raise NotExpressibleError("turns", f"its turns are not in the format ({error})"[:200]) from None
    return turns


def _learned_turns(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the turns without a gpt turn before the first human turn, and without those after the last answer."""
    system = list(turns[:1]) if turns and turns[0][0] == "system" else []
    spoken = list(turns[len(system) :])
    if spoken and spoken[0][0] == "gpt":
        del spoken[0]
    while spoken and spoken[-1][0] != "gpt":
        del spoken[-1]
    if not any(role == "human" for role, _ in spoken):
        raise NotExpressibleError("turns", "no human turn is followed by an answer")
    return system + spoken
