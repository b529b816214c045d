"""Answers in a conversation are those of the whole conversation read anew; text comes out whole."""

from __future__ import annotations

import dataclasses

import torch

from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.inference.chat_session import ChatSession, stream_text
from framestream.trainer.inference.generation import generate
from tests.helpers.model.rows import SMALL, dialogue, pack, small_model

NEW = 8


def longer(first, more: list[int]):
    return dataclasses.replace(first, ids=[*first.ids, *more], labels=[*first.labels, *[IGNORE_INDEX] * len(more)])


def test_every_answer_is_that_of_the_whole_conversation_read_anew():
    model = small_model(cfg=SMALL, scale=15.0).eval()
    calls = []
    model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    talk, prompt = ChatSession(model, NEW, -1), dialogue(1, clips=2, stills=1, text=9)
    for turn in range(4):
        expected = generate(model, [pack([prompt])], NEW, -1)[0]
        calls.clear()
        with torch.no_grad():
            answer = list(talk.answer(pack([prompt])))
        assert answer == expected and len(calls) == (turn == 0)
        said = answer if turn % 2 else [*answer[:3], 7]  # text that is tokenised anew may have other tokens
        prompt = longer(prompt, [*said, 3 + turn, 5, 9])


def test_an_answer_that_is_cut_short_does_no_harm():
    model = small_model(cfg=SMALL, scale=15.0).eval()
    prompt = dialogue(2, clips=1, text=6)
    talk = ChatSession(model, NEW, -1)
    stream = talk.answer(pack([prompt]))
    begun = [next(stream) for _ in range(3)]
    stream.close()
    further = longer(prompt, [*begun, 4, 8])
    assert list(talk.answer(pack([further]))) == generate(model, [pack([further])], NEW, -1)[0]


def test_other_media_are_read_anew():
    model = small_model(cfg=SMALL, scale=15.0).eval()
    talk = ChatSession(model, NEW, -1)
    list(talk.answer(pack([dialogue(3, clips=1, text=6)])))
    both = dialogue(3, clips=1, stills=1, text=6)
    assert list(talk.answer(pack([both]))) == generate(model, [pack([both])], NEW, -1)[0]


def test_characters_of_several_tokens_are_streamed_complete():
    data = "früh – 東".encode()
    pieces = list(stream_text(iter(data), lambda ids: bytes(ids).decode("utf-8", errors="replace")))
    assert "".join(pieces) == "früh – 東" and all("\ufffd" not in piece for piece in pieces) and len(pieces) > 4
    cut = list(stream_text(iter(data[:-1]), lambda ids: bytes(ids).decode("utf-8", errors="replace")))
    assert "".join(cut) == "früh – \ufffd"
