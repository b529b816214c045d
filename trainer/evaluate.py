"""``python -m trainer.evaluate --manifest M``: score held-out dialogues, with and without what they show.

Questions are those of the manifest's ``split: val`` shards, or with ``--annotations`` those of an annotation file about
files as they are. Each is answered by greedy generation, and where it has ``options``, by the likeliest of them too;
with its own frames and under two controls:

    blind       the frames of another question of the same family whose answer differs
    shuffled    its own frames in another order

A model that answers from the wording alone scores the same blind, one that does not see order the same shuffled.
Intervals are 95 % bootstrap percentiles over questions. Results go to RUN/evaluation.json (of an annotation file to
RUN/evaluation-STEM.json), and as a page to ``--html``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.evaluation.questions import Questions
from framestream.trainer.evaluation.cli import build_parser, run_command
from framestream.trainer.evaluation.scorer import evaluate
from framestream.trainer.evaluation.scores_html import render_scores_page

COLUMNS = {"questions": 10, "accuracy": 10, "blind": 8, "shuffled": 10, "gain": 8}  #: of the table, with their widths


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.evaluate") -> int:
    """Command line; returns the exit status (0 done, 1 weights that cannot be read, 2 bad input)."""
    held_out = "the stage's YAML; its held-out entries are asked"
    parser = build_parser(prog, __doc__.split("\n\n")[0], held_out, "evaluation.json, or evaluation-STEM.json")
    parser.add_argument("--annotations", type=Path, help="ask the questions of this file instead; needs --root")
    parser.add_argument("--root", type=Path, help="folder that its media paths are relative to")
    parser.add_argument("--limit", type=int, help="ask only the first LIMIT questions of each family")
    return run_command(parser, arguments, _ask, render_scores_page, table, _name)


def _name(options: argparse.Namespace) -> str:
    return f"evaluation-{options.annotations.stem}.json" if options.annotations else "evaluation.json"


def _ask(options: argparse.Namespace, manifest: Manifest, checkpoint: Path) -> dict:
    if (options.annotations is None) != (options.root is None):
        raise ManifestError("--annotations and --root belong together; give both or neither")
    questions = (
        Questions(manifest) if options.root is None else FileQuestions(manifest, options.annotations, options.root)
    )
    return evaluate(manifest, checkpoint, questions, options.limit)


def table(result: dict) -> list[str]:
    """The result as lines of text."""
    wide = max([20, *(len(row["family"]) for row in result["families"])]) + 2
    figures = "".join(name.rjust(width) for name, width in COLUMNS.items())
    lines = [f"{'family':<{wide}}{'by':<12}{figures}  interval"]
    for row in result["families"]:
        name, spread = row["family"], f"{row['gain_low']:.1f} to {row['gain_high']:.1f}"
        figures = "".join(
            f"{row[column]:{width}.{0 if column == 'questions' else 1}f}" for column, width in COLUMNS.items()
        )
        lines.append(f"{name:<{wide}}{row['method']:<12}{figures}  {spread}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
