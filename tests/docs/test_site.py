"""The docs site: its navigation has every page, its API pages have every public name, and its hook resolves links."""

from __future__ import annotations

import importlib
import importlib.util
import re
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
ENERGON = {"media_cooker", "cook_dialogue"}  #: their module needs Megatron-Energon


def pages(nav: list) -> list[str]:
    """Files of a navigation, in order."""
    found: list[str] = []
    for item in nav:
        for target in item.values():
            found += pages(target) if isinstance(target, list) else [target]
    return found


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_has_every_page_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages(site["nav"])) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize(
    ("page", "package"),
    [
        ("pipeline", "framestream.pipeline"),
        ("adapters", "framestream.pipeline.adapters"),
        ("inference", "framestream.trainer.inference"),
    ],
)
def test_the_reference_has_every_public_name(page, package):
    listed = re.findall(r"^::: (\S+)\.(\w+)$", (DOCS / "api" / f"{page}.md").read_text(encoding="utf-8"), re.M)
    public = importlib.import_module(package)
    assert {name for _, name in listed} - ENERGON == set(public.__all__)
    for module, name in listed:
        if name in ENERGON:
            source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
            assert f"\ndef {name}(" in source
        else:
            assert getattr(importlib.import_module(module), name) is public.__getattr__(name)


def test_links_out_of_the_docs_lead_to_the_repository():
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri="api/x.md")), {"repo_url": "https://host/repo"}
    text = "[a](../y.md#part) [b]({}) [c](https://other/) [d](#here) ![e](../demo/z.png)"
    resolved = hooks().on_page_markdown(text.format("../../README.md"), page=page, config=config)
    assert resolved == text.format("https://host/repo/blob/main/README.md")


def test_the_start_page_is_the_readme():
    page, config = SimpleNamespace(file=SimpleNamespace(src_uri="index.md")), {"repo_url": "https://host/repo"}
    text = hooks().on_page_markdown("", page=page, config=config)
    assert "](quickstart.md)" in text and "](docs/" not in text
    assert set(re.findall(r"\]\((?!http)([^)#]+)", text)) <= {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*")
    }
