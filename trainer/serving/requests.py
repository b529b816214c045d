"""Requests for chat completions: what is accepted, and what it means for the model.

Fields of the OpenAI API that would change the answer, but have no meaning here, are refused unless they have their
neutral value. Fields that never change an answer are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from framestream.pipeline.tokenization.chat_template import IMAGE_PLACEHOLDER, escape_placeholders
from framestream.pipeline.utils.command_line import near_name
from framestream.trainer.serving.errors import RequestError

MAX_MESSAGES = 1000  #: messages of a request, and parts of a message
MAX_VALUES = 200_000  #: values of a JSON body: the parser needs far more memory for each than for a character
MAX_FIELD = 40  #: characters of an unknown name that are compared and shown
NEAR_FIELD = 0.85  #: least similarity of a field that may be meant: ``top_k`` does not mean ``top_p``
MAX_SECOND = 1e7  #: largest second of a clip
ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}

PART_TYPES = ("text", "image_url", "video_url", "file")
Second = Annotated[float, Field(ge=0, le=MAX_SECOND)]


#: of every object of a request; pydantic compares NaN with no bound
_FORM = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Part(BaseModel):
    model_config = _FORM


class TextPart(_Part):
    """A text."""

    type: Literal["text"]
    text: str


class ImageAddress(_Part):
    """Where an image is. ``detail`` has no effect: the tiles of an image follow from its size."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Part):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageAddress


class VideoAddress(_Part):
    """Where a video is, and which seconds of it are shown."""

    url: str
    start: Second | None = None
    end: Second | None = None


class VideoPart(_Part):
    """A video."""

    type: Literal["video_url"]
    video_url: VideoAddress


class FileSource(_Part):
    """An uploaded file by its id, or a file's content as a data: URL."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None
    start: Second | None = None
    end: Second | None = None


class FilePart(_Part):
    """A video or an image, whichever the file is."""

    type: Literal["file"]
    file: FileSource


ContentPart = Annotated[TextPart | ImagePart | VideoPart | FilePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn. Fields of an earlier answer that have no content (``refusal``, ``audio``) may be null."""

    model_config = _FORM
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_MESSAGES)]
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[None] | None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(_Part):
    """``include_usage`` adds an event with the numbers of tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Part):
    """The only form of answers."""

    type: Literal["text"]


class VideoFrames(_Part):
    """The most frames that are sampled of a video."""

    num_frames: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class MediaSettings(_Part):
    """How media are read, in the words of vLLM."""

    video: VideoFrames = VideoFrames()


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``."""

    model_config = _FORM
    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    media_io_kwargs: MediaSettings = MediaSettings()
    # neutral values of settings that this server does not have
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    # labels that change no answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stops if text]


#: the parts of a message by their type, and other objects by the field that has them
_PARTS: dict[str | None, type[BaseModel]] = dict(
    zip(PART_TYPES, (TextPart, ImagePart, VideoPart, FilePart), strict=True)
)
_OBJECTS: dict[str | None, type[BaseModel]] = {
    None: ChatRequest,
    "image_url": ImageAddress,
    "video_url": VideoAddress,
    "file": FileSource,
    "stream_options": StreamOptions,
    "media_io_kwargs": MediaSettings,
    "video": VideoFrames,
}


@dataclass(frozen=True, slots=True)
class MediaReference:
    """A media item of a request, before its bytes are known."""

    param: str  #: the field of the request that names it
    kind: str  #: ``image``, ``video``, or empty for whichever the file is
    url: str = ""  #: data:, http: or https:
    file_id: str = ""  #: of an upload
    start: float | None = None  #: second at which the shown part begins
    end: float | None = None  #: second at which it ends


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read the JSON body of a request.

    Raises:
        RequestError: it is not JSON, or has a field that is wrong or unknown; the first one is named.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise RequestError(400, f"the body has over {MAX_VALUES:,} values; send fewer", "too_many_values")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # of a value that may be a text or a list, the error of a list is the one that helps
        found = error.errors(include_url=False, include_input=False)
        first = max(found, key=lambda item: (len(item["loc"]), item["type"] != "string_type"))
        param = _field_name(first["loc"])
        code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
        if first["type"] == "extra_forbidden":
            near = near_name(str(first["loc"][-1])[:MAX_FIELD], _known_fields(first["loc"]), NEAR_FIELD)
            fix = f"did you mean {near}?" if near else "leave it out"
            raise RequestError(400, f"{param} is not supported; {fix}", "unknown_field", param) from None
        if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
            tag, param = first.get("ctx", {}).get("tag"), f"{param}.type"
            fault = f"is missing; it is one of {', '.join(PART_TYPES)}"
            if tag is not None:
                fault = f"{str(tag)[:MAX_FIELD]!r} is not one of {', '.join(PART_TYPES)}"
            raise RequestError(400, f"{param}: {fault}", code, param) from None
        raise RequestError(400, f"{param or 'the body'}: {first['msg']}", code, param or None) from None


def _known_fields(location: tuple[int | str, ...]) -> Iterable[str]:
    """Return the fields of the object that has an unknown field at ``location``."""
    before = (None, None, *location[:-1])[-2:]
    if isinstance(before[1], int):
        return Message.model_fields
    models = _PARTS if isinstance(before[0], int) else _OBJECTS
    model = models.get(before[1])
    return model.model_fields if model else ()


def _field_name(location: tuple[int | str, ...]) -> str:
    """Write the place of a field as in Python, without the names of alternatives that pydantic puts between."""
    name, previous = "", location[0] if location else ""
    for step in location:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier() and step != "str" and not (isinstance(previous, int) and step in PART_TYPES):
            name += f".{step}" if name else step
        previous = step
    return name


def to_turns(request: ChatRequest) -> tuple[list[dict[str, str]], list[MediaReference]]:
    """Return the turns of a request as annotations write them, and its media in the order of their marks.

    Raises:
        RequestError: the messages do not end with a question, or begin with an answer.
    """
    turns, media = [], []
    for number, message in enumerate(request.messages):
        where = f"messages[{number}]"
        if isinstance(message.content, str):
            text = escape_placeholders(message.content)
        else:
            pieces = []
            for place, part in enumerate(message.content):
                if isinstance(part, TextPart):
                    pieces.append(escape_placeholders(part.text))
                else:
                    media.append(_reference(part, f"{where}.content[{place}]"))
                    pieces.append(f"{IMAGE_PLACEHOLDER}\n")
            text = "".join(pieces)
            if message.role != "user" and IMAGE_PLACEHOLDER in text:
                raise RequestError(400, f"{where}: only messages of the user have media", "invalid_value", where)
        turns.append({"from": ROLES[message.role], "value": text})
    talk = [turn for turn in turns if turn["from"] != "system"]
    if not talk or talk[-1]["from"] != "human" or turns[-1]["from"] != "human":
        raise RequestError(400, "the last message must be of the user; add the question", "invalid_value", "messages")
    if talk[0]["from"] != "human":
        raise RequestError(400, "the first message must be of the user; add it", "invalid_value", "messages")
    if any(turn["from"] == "system" for turn in turns[1:]):
        raise RequestError(400, "a system message must be the first one; move it", "invalid_value", "messages")
    return turns, media


def _reference(part: ImagePart | VideoPart | FilePart, where: str) -> MediaReference:
    if isinstance(part, ImagePart):
        return MediaReference(f"{where}.image_url", "image", part.image_url.url)
    if isinstance(part, VideoPart):
        video, param = part.video_url, f"{where}.video_url"
        _check_bounds(video.start, video.end, param)
        return MediaReference(param, "video", video.url, start=video.start, end=video.end)
    file, param = part.file, f"{where}.file"
    _check_bounds(file.start, file.end, param)
    if (file.file_id is None) == (file.file_data is None):
        raise RequestError(400, f"{param} needs either file_id or file_data", "invalid_value", param)
    return MediaReference(param, "", file.file_data or "", file.file_id or "", file.start, file.end)


def _check_bounds(start: float | None, end: float | None, param: str) -> None:
    if start is not None and end is not None and end <= start:
        raise RequestError(400, f"{param}: end {end:g} is not after start {start:g}", "invalid_value", f"{param}.end")
