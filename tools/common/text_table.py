"""Text tables for the terminal, with sizes in readable units and long cells shortened."""

from __future__ import annotations

from collections.abc import Sequence

#: Headings of columns that hold numbers: their cells are right-aligned.
NUMERIC_COLUMNS = frozenset(("planned", "dialogues", "media", "found", "frames", "bytes"))


def truncate(text: str, width: int) -> str:
    """Shorten ``text`` to ``width`` characters: "..." replaces characters before the last third."""
    tail = width // 3
    return text if len(text) <= width else f"{text[: width - tail - 3]}...{text[-tail:]}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with three digits, in B, kB, MB, GB or TB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with a line below its headings. Columns of :data:`NUMERIC_COLUMNS` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if name in NUMERIC_COLUMNS else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
