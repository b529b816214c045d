"""HTML pages parsed with the parser of the standard library."""

from __future__ import annotations

import html.parser

VOID = {"meta", "img", "link"}


class Page(html.parser.HTMLParser):
    """Text, attributes and nesting of a page; unbalanced tags raise an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def cells(self) -> str:
        return " ".join(" ".join(self.text).split())
