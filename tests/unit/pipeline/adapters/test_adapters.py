"""The package as a whole: what importing it brings along, and what is said where another package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from framestream.pipeline import adapters
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

OTHERS = {"transformers", "torchvision", "megatron", "wids", "datasets", "deepspeed"}


def run(code: str) -> subprocess.CompletedProcess:
    root = ROOT
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)


def test_no_other_package_comes_along():
    names = ", ".join(adapters.__all__)
    done = run(
        f"import sys\nfrom framestream.pipeline.adapters import {names}\nprint(*{OTHERS!r} & sys.modules.keys())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_energon_missing_is_said_in_one_line():
    done = run("import sys\nsys.modules['megatron'] = None\nimport framestream.pipeline.adapters.energon")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: framestream.pipeline.adapters.energon: ")
    assert done.stderr.splitlines()[-1].endswith("; pip install megatron-energon")


def test_it_imports_without_asserts_docstrings_and_warnings():
    names = ", ".join(adapters.__all__)
    code = f"from framestream.pipeline import build_loader\nfrom framestream.pipeline.adapters import {names}"
    command = [sys.executable, "-OO", "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
