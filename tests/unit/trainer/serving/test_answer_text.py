"""Answers come in pieces that join to the decoded answer, whatever the tokens are, and end at stop texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.trainer.serving.answer_text import AnswerText


def decode(ids: list[int]) -> str:
    """Each token is a byte of UTF-8."""
    return bytes(ids).decode(errors="replace")


def pieces(text: str, stops: list[str] = []) -> tuple[list[str], AnswerText]:  # noqa: B006
    answer, found = AnswerText(decode, stops), []
    for token in text.encode():
        found.append(answer.push(token))
        if answer.stopped:
            return found, answer
    return [*found, answer.finish()], answer


@given(st.text())
def test_pieces_join_to_the_answer(text):
    found, answer = pieces(text)
    assert "".join(found) == text and not answer.stopped


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_text(text, stops):
    found, answer = pieces(text, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    # of the texts that are complete at the same token, the one that begins first
    cut = min((text.find(stop) for stop in stops if stop in text[: min(ends)]), default=0) if ends else len(text)
    assert "".join(found) == text[:cut] and answer.stopped == bool(ends)


def test_a_character_comes_when_all_its_tokens_have():
    found, _ = pieces("a\u20acb")
    assert found == ["a", "", "", "\u20ac", "b", ""]


def test_an_incomplete_character_comes_in_the_end():
    answer = AnswerText(decode)
    assert [answer.push(token) for token in "x\u20ac".encode()[:3]] == ["x", "", ""]
    assert answer.finish() == "\ufffd"


@pytest.mark.parametrize(("text", "shown"), [("one EN", ["one ", "EN"]), ("one END two", ["one "])])
def test_what_may_be_a_stop_text_is_held_back(text, shown):
    found, _ = pieces(text, ["END"])
    assert [piece for piece in ("".join(found[:4]), "".join(found[4:])) if piece] == shown
