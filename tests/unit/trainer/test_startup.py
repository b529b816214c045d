"""Commands answer ``--help`` before they import torch, and scoring never imports DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

HEAVY = {"torch", "transformers", "deepspeed"}
COMMANDS = ["train", "chat", "serve", "evaluate", "haystack", "export", "report"]

#: runs argv[1:] of the console command, then reports imported packages on stderr
HELP = """
import json, sys
from framestream.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
"""

#: imports argv[1:], and reports imported packages
IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
SCORING = [
    "framestream.trainer.report",
    "framestream.trainer.evaluate",
    "framestream.trainer.haystack",
    "framestream.trainer.evaluation.cli",
    "framestream.trainer.evaluation.haystack_html",
    "framestream.trainer.evaluation.haystack_search",
    "framestream.trainer.evaluation.report_images",
    "framestream.trainer.evaluation.run_report",
    "framestream.trainer.evaluation.scorer",
    "framestream.trainer.evaluation.scores_html",
    "framestream.trainer.weights.runs",
    "framestream.pipeline.evaluation.file_questions",
    "framestream.pipeline.evaluation.haystack",
]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python code in its own process."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    done = run(HELP, command, "--help")
    modules = json.loads(done.stderr.splitlines()[-1])
    assert done.stdout.startswith(f"usage: framestream {command} ")
    assert not HEAVY & set(modules)


def test_scoring_never_imports_deepspeed():
    modules = json.loads(run(IMPORT, *SCORING).stdout)
    assert "torch" in modules and "deepspeed" not in modules


def test_names_of_the_inference_api_are_imported_on_first_use():
    modules = json.loads(run(IMPORT, "framestream.trainer.inference").stdout)
    assert not HEAVY & set(modules)


def test_every_name_of_the_inference_api_exists():
    from framestream.trainer import inference

    for name in inference.__all__:
        assert getattr(inference, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = inference.nothing
