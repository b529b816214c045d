"""What a verification finds: one line each, counted without bound and kept up to a number."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

RESTORE = "bring it back from a copy, or build the root again"


class Finding(NamedTuple):
    """Something that is not as it should be: the file, what is wrong, and the fix."""

    file: str
    what: str
    fix: str


class Findings:
    """Findings in the order found: all are counted, the first ``most`` are kept."""

    def __init__(self, most: int) -> None:
        self.kept: list[Finding] = []
        self.count = 0
        self._most = most

    def add(self, file: str | Path, what: str, fix: str = RESTORE) -> None:
        self.count += 1
        if len(self.kept) < self._most:
            self.kept.append(Finding(_printable(str(file)), _printable(what), fix))

    def extend(self, other: Findings) -> None:
        self.count += other.count
        self.kept += other.kept[: self._most - len(self.kept)]


def _printable(text: str) -> str:
    """One line without characters that a terminal acts on."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
