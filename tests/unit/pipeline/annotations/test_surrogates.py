"""Half UTF-16 pairs in JSON, against Python's own parser."""

import io
import json

from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.annotations.surrogates import REPLACEMENT, SurrogateFilter

PIECES = st.sampled_from(["\ud83d", "\ude00", "😀", "\\", "\\ud83d", '"', "\n", "u", "d83d", "é", "x" * 7])


def read(text: bytes, head: int, size: int) -> str:
    file = SurrogateFilter(text[:head], io.BytesIO(text[head:]))
    assert file.read(0) == b""
    return b"".join(iter(lambda: file.read(size), b"")).decode()


@given(st.lists(st.lists(PIECES).map("".join)), st.integers(0, 40), st.integers(1, 40), st.booleans())
def test_only_halves_change_wherever_reads_end(texts, head, size, upper):
    written = json.dumps(texts)  # one code unit each: halves that meet are read as a pair
    if upper:
        written = written.replace("\\ud", "\\uD")
    halves = "".join(map(chr, range(0xD800, 0xE000)))
    expected = [text.translate(dict.fromkeys(map(ord, halves), REPLACEMENT)) for text in json.loads(written)]
    assert json.loads(read(written.encode(), head, size)) == expected


def test_text_without_halves_stays_as_it_is():
    text = json.dumps(["\\ud83d is written so", "😀", "C:\\users\\udo"]).encode()
    assert read(text, 5, 3).encode() == text
