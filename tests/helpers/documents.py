"""Commands of documents.

A block of commands that no test can run stands below a comment, ``<!-- not run by the tests: WHY -->``.
"""

from __future__ import annotations

import re

PROGRAMS = "python|pip|cp|sbatch|srun|torchrun|deepspeed|ray|hf|export|make|lmms_eval"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) .*")


def commands(page: str) -> list[tuple[str, str, str]]:
    """Heading, command and reason not to run it (empty: it is run) of every indented command of a page."""
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
