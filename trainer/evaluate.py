"""``python -m trainer.evaluate --manifest M``: score held-out dialogues, with and without the frames they are about.

Questions are those of the manifest's ``split: val`` shards, or with ``--annotations`` those of an annotation file about
media files. Each is answered by greedy generation. If it has ``options``, the most likely of them is a second answer.
Each is asked with its own frames and under two controls:

    blind       the frames of another question of the same family whose answer differs
    shuffled    its own frames in another order

Questions whose answers are intervals of time have an IoU in place of being right or wrong.

A model that answers from the wording alone scores the same blind; one that does not see order scores the same shuffled.
Intervals are 95 % bootstrap percentiles over questions. Results are written to RUN/evaluation.json of the run that is
scored (for an annotation file to RUN/evaluation-STEM.json), and as a page to ``--html``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from framestream.pipeline.utils.command_line import integer_option, path_option, run_safely
from framestream.trainer.evaluation.cli import build_parser, run_command

if TYPE_CHECKING:
    from framestream.pipeline.config.manifest import Manifest
    from framestream.trainer.evaluation.rank_pool import RankPool

COLUMNS = {"questions": 10, "accuracy": 10, "blind": 8, "shuffled": 10, "gain": 8}  #: of the table, with their widths


@run_safely("stopped; nothing was written", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.evaluate") -> int:
    """Run the command line; returns the exit status: 0 done, 1 weights that cannot be read, 2 bad input, 130 Ctrl-C."""
    description = "Score held-out dialogues, with and without the frames they are about."
    held_out = "the stage's YAML; its held-out entries are asked"
    parser = build_parser(prog, description, held_out, "evaluation.json, or evaluation-STEM.json")
    parser.add_argument("--annotations", type=path_option, help="ask the questions of this file instead; needs --root")
    parser.add_argument("--root", type=path_option, help="folder that its media paths are relative to")
    parser.add_argument("--limit", type=integer_option(1), help="ask only the first LIMIT questions of each family")
    return run_command(parser, arguments, _score, _page, _table, _result_name)


def _result_name(options: argparse.Namespace) -> str:
    return f"evaluation-{options.annotations.stem}.json" if options.annotations else "evaluation.json"


def _score(options: argparse.Namespace, manifest: Manifest, checkpoint: Path, ranks: RankPool) -> dict | None:
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.pipeline.evaluation.file_questions import FileQuestions
    from framestream.pipeline.evaluation.questions import Questions, QuestionSource
    from framestream.trainer.evaluation.scorer import evaluate

    if (options.annotations is None) != (options.root is None):
        raise ManifestError("--annotations and --root belong together; give both or neither")
    questions: QuestionSource
    if options.annotations is None:
        questions = Questions(manifest)
    else:
        questions = FileQuestions(manifest, options.annotations, options.root)
    return evaluate(manifest, checkpoint, questions, options.limit, ranks=ranks)


def _page(result: dict) -> str:
    from framestream.trainer.evaluation.scores_html import render_scores_page

    return render_scores_page(result)


def _table(result: dict) -> list[str]:
    """Format the result as lines of text."""
    from framestream.trainer.evaluation.grounding import format_grounding
    from framestream.trainer.evaluation.metrics import format_points

    width = max([20, *(len(row["family"]) for row in result["families"])]) + 2
    titles = "".join(name.rjust(size) for name, size in COLUMNS.items())
    lines = [f"{'family':<{width}}{'by':<12}{titles}  interval"]
    for row in result["families"]:
        name = row["family"]
        interval = "none" if row["gain"] is None else f"{row['gain_low']:.1f} to {row['gain_high']:.1f}"
        shown = {column: format_points(row[column]) for column in COLUMNS} | {"questions": str(row["questions"])}
        figures = "".join(shown[column].rjust(size) for column, size in COLUMNS.items())
        lines.append(f"{name:<{width}}{row['method']:<12}{figures}  {interval}")
    return [*(lines if result["families"] else []), *format_grounding(result["grounding"])]


if __name__ == "__main__":
    sys.exit(main())
