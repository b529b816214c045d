"""Requests that are read as they are meant, and those that are refused by the name of their field."""

from __future__ import annotations

import json
import math

import pytest

from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.requests import MAX_VALUES, parse_chat_request, to_turns

USER = {"role": "user", "content": "Which?"}
VIDEO = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA==", "start": 1, "end": 2.5}}
TEXT = {"type": "text", "text": "a <image> b"}


def body(**fields) -> bytes:
    return json.dumps({"model": "toy", "messages": [USER], **fields}).encode()


def user(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


def test_parts_become_marks_and_texts():
    image = {"type": "image_url", "image_url": {"url": "http://host/a.png", "detail": "low"}}
    file = {"type": "file", "file": {"file_id": "file-1", "start": 3}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *user(VIDEO, TEXT),
        {"role": "assistant", "content": "This.", "refusal": None, "audio": None},
        *user(image, file, {"type": "text", "text": "And?"}),
    ]
    turns, media = to_turns(parse_chat_request(body(messages=messages)))
    assert [turn["from"] for turn in turns] == ["system", "human", "gpt", "human"]
    assert turns[1]["value"].startswith("<image>\na ") and turns[1]["value"].count("<image>") == 1
    assert turns[3]["value"] == "<image>\n<image>\nAnd?"
    assert [(item.kind, item.param, item.start, item.end, item.file_id) for item in media] == [
        ("video", "messages[1].content[0].video_url", 1.0, 2.5, ""),
        ("image", "messages[3].content[0].image_url", None, None, ""),
        ("", "messages[3].content[1].file", 3.0, None, "file-1"),
    ]


def test_neutral_values_of_other_settings_are_accepted():
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
    }
    labels = {"user": "me", "metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"}}
    chat = parse_chat_request(body(**neutral, **labels, stop=["a", ""], stream_options={"include_usage": True}))
    assert chat.stops == ["a"] and chat.stream_options.include_usage
    assert parse_chat_request(body(stop="b")).stops == ["b"] and parse_chat_request(body(stop=None)).stops == []


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"n": 2}, "n", "should be 1"),
        ({"logprobs": True}, "logprobs", "False"),
        ({"presence_penalty": 1}, "presence_penalty", "less than or equal to 0"),
        ({"tools": [{}]}, "tools", "at most 0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"tempreature": 1}, "tempreature", "not supported; did you mean temperature?"),
        ({"max_token": 1}, "max_token", "not supported; did you mean max_tokens?"),
        ({"top_k": 1}, "top_k", "not supported; leave it out"),
        ({"stream_options": {"include_usag": True}}, "stream_options.include_usag", "did you mean include_usage?"),
        ({"media_io_kwargs": {"video": {"num_frame": 2}}}, "media_io_kwargs.video.num_frame", "mean num_frames?"),
        ({"messages": [{**USER, "contents": "x"}]}, "messages[0].contents", "did you mean content?"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [USER] * 1001}, "messages", "at most 1000"),
        ({"messages": user(*[TEXT] * 1001)}, "messages[0].content", "at most 1000"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        (
            {"messages": user({"type": "video"})},
            "messages[0].content[0].type",
            "'video' is not one of text, image_url, video_url, file",
        ),
        ({"messages": user({"text": "a"})}, "messages[0].content[0].type", "is missing; it is one of text, image_url"),
        (
            {"messages": user({**VIDEO, "video_url": {"url": "data:,", "starts": 1}})},
            "messages[0].content[0].video_url.starts",
            "did you mean start?",
        ),
        ({"messages": user({"type": "text"})}, "messages[0].content[0].text", "required"),
        ({"messages": user({"type": "image_url"})}, "messages[0].content[0].image_url", "required"),
        (
            {"messages": user({"type": "image_url", "image_url": {}})},
            "messages[0].content[0].image_url.url",
            "required",
        ),
        ({"messages": user({**VIDEO, "fps": 2})}, "messages[0].content[0].fps", "not supported"),
        *(({name: math.nan}, name, "finite number") for name in ("temperature", "top_p", "presence_penalty")),
    ],
)
def test_a_wrong_field_is_named(fields, param, why):
    with pytest.raises(RequestError, match=why) as refused:
        parse_chat_request(body(**fields))
    assert refused.value.status == 400 and refused.value.param == param, refused.value.param


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "NaN", "Infinity"])
@pytest.mark.parametrize("name", ["start", "end"])
def test_seconds_of_a_clip_are_finite(name, value):
    for kind, source in (("video_url", {"url": "data:,"}), ("file", {"file_id": "file-1"})):
        with pytest.raises(RequestError, match="finite number") as refused:
            parse_chat_request(body(messages=user({"type": kind, kind: {**source, name: value}})))
        assert refused.value.status == 400 and refused.value.param == f"messages[0].content[0].{kind}.{name}"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}', b"1e999"])
def test_what_is_no_request_is_refused(data):
    with pytest.raises(RequestError) as refused:
        parse_chat_request(data)
    assert refused.value.status == 400


def test_many_values_are_refused_before_they_are_parsed():
    with pytest.raises(RequestError, match="values") as refused:
        parse_chat_request(b"[" + b"{}," * MAX_VALUES + b"{}]")
    assert refused.value.code == "too_many_values"


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([USER, {"role": "assistant", "content": "a"}], "last message"),
        ([{"role": "system", "content": "a"}], "last message"),
        ([{"role": "assistant", "content": "a"}, USER], "first message"),
        ([USER, {"role": "system", "content": "a"}, USER], "must be the first"),
        ([{"role": "system", "content": [VIDEO]}, USER], "only messages of the user"),
        (user({**VIDEO, "video_url": {"url": "data:,", "start": 2, "end": 1}}), "not after start"),
        (user({"type": "file", "file": {}}), "either file_id or file_data"),
        (user({"type": "file", "file": {"file_id": "a", "file_data": "b"}}), "either file_id or file_data"),
    ],
)
def test_dialogues_that_no_answer_follows_are_refused(messages, why):
    with pytest.raises(RequestError, match=why) as refused:
        to_turns(parse_chat_request(body(messages=messages)))
    assert refused.value.status == 400
