"""TODO."""

from __future__ import annotations

from collections.abc import Sequence


def truncate(text: str, width: int) -> str:
    """``text``, cut to ``width`` characters by leaving out some before its last third."""
    tail = width // 3
    return text if len(text) <= width else f"{text[: width - tail - 3]}...{text[-tail:]}"


def format_bytes(count: int) -> str:
    """``count`` bytes in the largest fitting unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal; numbers are at the right of their columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numbers = {
        i for i, name in enumerate(head) if name in ("planned", "dialogues", "media", "found", "frames", "bytes")
    }
    lines = []
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
