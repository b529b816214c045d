"""Findings of a verification: every one is counted, and a limited number is listed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

RESTORE = "restore it from a copy, or build the root again"


class Finding(NamedTuple):
    """One problem: the file, what is wrong with it, and the fix."""

    file: str
    problem: str
    fix: str


class Findings:
    """Findings in the order they were found. All are counted; the first ``max_listed`` are listed."""

    def __init__(self, max_listed: int) -> None:
        self.listed: list[Finding] = []
        self.count = 0
        self._max_listed = max_listed

    def add(self, file: str | Path, problem: str, fix: str = RESTORE) -> None:
        """Count a finding and list it while there is room. Its texts become printable single lines."""
        self.count += 1
        if len(self.listed) < self._max_listed:
            self.listed.append(Finding(_printable(str(file)), _printable(problem), fix))

    def extend(self, other: Findings) -> None:
        """Append the findings of ``other``."""
        self.count += other.count
        self.listed += other.listed[: self._max_listed - len(self.listed)]


def _printable(text: str) -> str:
    """Return one line in which control characters, which a terminal would act on, are escaped."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
