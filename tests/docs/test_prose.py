"""README and documents are written in short sentences: the counts of tests/helpers/documents.py stay below bounds."""

from __future__ import annotations

import re
import statistics

from tests.helpers.documents import prose, sentences
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MEDIAN_WORDS = 18  #: of a sentence, over all pages together
PAGE_MEDIAN_WORDS = 20  #: of a sentence, of each page alone
LONGEST = 45  #: words of any sentence
SEMICOLONS = 3  #: in 1,000 words, over all pages together
#: words that plain English has another word for
PRIVATE_WORDS = (
    r"\banew\b|\bhandful|\bat hand\b|\bfor want of\b|\bletter for letter\b|\bof which\b|\bso deep\b|\btally\b"
)


def lengths(text: str) -> list[int]:
    return [len(sentence.split()) for sentence in sentences(text)]


def test_sentences_are_short():
    counts = {page.relative_to(ROOT).as_posix(): lengths(page.read_text(encoding="utf-8")) for page in PAGES}
    assert statistics.median(sum(counts.values(), [])) <= MEDIAN_WORDS
    long = {name: statistics.median(found) for name, found in counts.items() if found}
    assert {name: median for name, median in long.items() if median > PAGE_MEDIAN_WORDS} == {}


def test_no_sentence_is_very_long():
    found = [(page.name, part) for page in PAGES for part in sentences(page.read_text(encoding="utf-8"))]
    assert [(name, part) for name, part in found if len(part.split()) > LONGEST] == []


def test_semicolons_are_rare():
    words = " ".join(block for page in PAGES for block in prose(page.read_text(encoding="utf-8")))
    assert 1000 * words.count(";") / len(words.split()) <= SEMICOLONS


def test_private_words_are_not_used():
    for page in PAGES:
        for block in prose(page.read_text(encoding="utf-8")):
            assert not (found := re.search(PRIVATE_WORDS, block)), f"{page.name}: {found[0]!r} in {block!r}"


def test_the_counts_leave_out_what_is_not_prose():
    page = (
        "# A heading that is long\n\nOne two three. Four five `six; seven` eight!\n\n    code; is not prose\n\n"
        "| a; table |\n| --- |\n\n<!-- a; comment -->\n\n```yaml\nmore: code;\n```\n- An item [with a link](page.md).\n"
        "- A second one; it goes\n  on here.\n"
    )
    assert sentences(page) == [
        "One two three.",
        "Four five code eight!",
        "An item with a link.",
        "A second one; it goes on here.",
    ]
    assert sum(block.count(";") for block in prose(page)) == 1
