"""Commands and sentences of documents.

A block of commands that no test can run follows a comment, ``<!-- not run by the tests: WHY -->``.
"""

from __future__ import annotations

import re

PROGRAMS = "python|pip|cp|sbatch|srun|torchrun|deepspeed|ray|hf|export|make|lmms_eval"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) .*")


def commands(page: str) -> list[tuple[str, str, str]]:
    """Return heading, command and reason not to run it (empty: it is run) of every indented command of a page."""
    found, heading, why = [], "", ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif reason := re.fullmatch(r"<!-- not run by the tests: (.+) -->", line):
            why = reason[1]
        elif line.startswith("    ") and COMMAND.fullmatch(line[4:]):
            found.append((heading, line[4:], why))
        elif line:
            why = ""
    return found


def prose(page: str) -> list[str]:
    """Return paragraphs and list items of a page, without comments, code blocks, tables, images and headings.

    Links are replaced by their text, and inline code counts as one word.
    """
    page = re.sub(r"<!--.*?-->", "", page, flags=re.S)
    page = re.sub(r"^```.*?^```$", "", page, flags=re.S | re.M)
    page = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", page)
    page = re.sub(r"^(?: {4}|\||#|:::|!!!).*$", "", page, flags=re.M)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    page = re.sub(r"`[^`]*`", "code", page)
    blocks = re.split(r"\n\s*\n|\n(?=(?:[-*]|\d+\.) )", page)
    joined = (re.sub(r"^(?:[-*]|\d+\.) ", "", " ".join(block.split())) for block in blocks)
    return [block for block in joined if block]


def sentences(page: str) -> list[str]:
    """Return the sentences of a page: they end in ``.``, ``!`` or ``?`` before a new word, or with their paragraph.

    A colon or a semicolon does not end a sentence. Fragments of one or two words are omitted.
    """
    parts = (part for block in prose(page) for part in re.split(r"(?<=[.!?])[\")*]* (?=[\"(*]*[A-Z0-9c])", block))
    return [part for part in parts if len(part.split()) > 2]
