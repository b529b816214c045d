"""The code of an export: it needs nothing of framestream, and only the packages that it names."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from framestream.pipeline.config import model as model_config
from framestream.trainer.standalone import settings
from framestream.trainer.standalone.export_files import ENTRY_MODULES, MODULES, REQUIREMENTS, standalone_source
from tests.helpers.paths import ROOT

#: import name -> name for pip, if that is another
PIP_NAMES = {"PIL": "pillow"}
OPTIONAL = {"flash_attn"}  #: imported in a try block


def imports(source: str) -> tuple[set[str], set[str]]:
    """Return the packages that a file imports, and the files beside it."""
    packages, files = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            target = files if node.level else packages
            target.add((node.module or "").partition(".")[0])
    return packages - sys.stdlib_module_names, files


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_required_packages_and_files_beside_it(module):
    source = standalone_source(module)
    packages, files = imports(source)
    required = {re.match(r"[\w-]+", requirement)[0] for requirement in REQUIREMENTS}
    assert {PIP_NAMES.get(name, name) for name in packages - OPTIONAL} <= required
    names = {name.rpartition(".")[2] for name in MODULES}
    assert files <= names
    # transformers looks for files beside it by this expression, also in docstrings
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.M)) == files
    assert not re.search(r"^\s*import\s+\.", source, re.M)
    assert source.startswith("# Part of a model exported by framestream. SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("module", ENTRY_MODULES)
def test_a_file_of_a_class_names_all_files_that_it_needs(module):
    """transformers 5.0 copies the files that it names, and none that these name."""
    sources = {name.rpartition(".")[2]: standalone_source(name) for name in MODULES}
    named = imports(sources[module.rpartition(".")[2]])[1]
    assert {file for name in named for file in imports(sources[name])[1]} <= named


def test_files_have_names_of_their_own():
    assert len({name.rpartition(".")[2] for name in MODULES}) == len(MODULES)


def test_a_module_with_other_imports_is_refused():
    with pytest.raises(ValueError, match=r"is not copied into exports; add it to MODULES"):
        standalone_source("framestream.trainer.model.video_llm")


def test_requirements_are_the_bounds_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert [name for name in REQUIREMENTS if f'    "{name}",' not in pyproject] == []


def test_settings_stand_for_those_of_the_package():
    for name in ("TOKENS_PER_CLIP", "TOKENS_PER_TILE"):
        assert getattr(settings, name) == getattr(model_config, name)
    for module in MODULES:
        for line in re.findall(r"^from \.settings import (.+)$", standalone_source(module), re.M):
            assert [name for name in line.split(", ") if not hasattr(settings, name)] == [], module
