"""The commands of README and documents run as they stand, in their order, in a folder like the project's.

docs/building.md and docs/reuse.md have tests of their own, tests/docs/test_building.py and tests/docs/test_reuse.py.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from framestream.pipeline import load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.tools import demo_data
from framestream.tools.demo import tokenizer as demo_tokenizer
from framestream.tools.demo import worlds as demo_worlds
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, save_weights
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.documents import commands
from tests.helpers.html_page import Page
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TESTS = {"building.md", "reuse.md"}
BENCHMARK = re.compile(r"(?:\w+=\S+ )*python -m benchmarks(?:\.(\w+))?\.(\w+)")
COLOURS = ("red", "blue", "green")


def fenced(page: str, language: str) -> str:
    """The first fenced block of a language."""
    return re.search(rf"^```{language}\n(.*?)^```$", page, re.S | re.M)[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder like the project's after the demo, with a model that was never trained, and with a user's own files."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("manifests", "tools", "pipeline", "trainer", "docs"):
        (folder / name).symlink_to(ROOT / name)
    data, media = folder / "demo" / "data", folder / "mine" / "media"
    media.mkdir(parents=True)
    for name in ("annotations", "media"):
        (data / name).mkdir(parents=True)
    demo_tokenizer.write_tokenizer(data / "tokenizer")
    demo_data.write_annotation(data / "annotations" / "needles.jsonl", demo_data.needle_records(data / "media", 1)[:2])
    demo_data.write_videos(demo_worlds.plan("haystack", 1), data / "media", 1, 1)
    for split, count in (("train", 3), ("val", 2)):
        rows = []
        for number, colour in enumerate(COLOURS[:count]):
            name = f"{split}-{number}.mp4"
            corpus.write_video(media / name, corpus.COLOURS[colour], 4, seed=number)
            turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
            rows.append(json.dumps({"video": name, "conversations": turns, "options": COLOURS[:count]}))
        (folder / "mine" / f"{split}.jsonl").write_text("\n".join(rows))
    heldout = data / "media" / "heldout" / "heldout-order-0000.mp4"
    heldout.parent.mkdir()
    heldout.symlink_to(media / "val-0.mp4")
    for page, name in (("README.md", "mine.yaml"), ("docs/quickstart.md", "quick.yaml")):
        (folder / name).write_text(fenced((ROOT / page).read_text(encoding="utf-8"), "yaml"))
    return folder


@pytest.fixture
def inside(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stage4 = load_manifest(
        "manifests/demo/stage4.yaml",
        ('init_from={"run": "", "vision_tower": "random", "connector": "random", "language_model": "random"}',),
    )
    if not Path("demo/runs/stage4/final").exists():
        model = build_model(stage4)
        initialize(model, stage4)
        save_weights(model, Path("demo/runs/stage4/final"), stage4)
        Path("demo/runs/stage4/manifest.yaml").write_text(yaml.safe_dump(to_dict(stage4)))
    return project


def run(command: str) -> None:
    """Run a command line: in this process, but for training."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        del words[0]
    assert words[0] == "python", f"{command}: no test can run this; say why above it"
    if words[1:3] == ["-m", "trainer"] and "--dry-run" not in words:
        corpus.run(sys.executable, *words[1:], cwd=Path.cwd())
        return
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    name = "framestream.trainer.__main__" if name == "trainer" else name.replace("/", ".")
    assert importlib.import_module(name).main(arguments) == 0, command


def documented(page: Path) -> list[str]:
    """Commands of a page that this file runs."""
    listed = commands(page.read_text(encoding="utf-8"))
    return [command for _, command, why in listed if not (why or BENCHMARK.match(command))]


def test_the_commands_run_as_they_stand(inside):
    for page in PAGES:
        if page.name not in OWN_TESTS:
            for command in documented(page):
                run(command)
    assert Page(Path("report.html").read_text()).cells().count("mine")
    exec(compile(fenced(PAGES[0].read_text(encoding="utf-8"), "python"), "README.md", "exec"), {})
    scores = json.loads(Path("runs/mine/evaluation.json").read_text())
    assert {row["method"] for row in scores["families"]} == {"generation", "likelihood"}


def test_documented_benchmarks_have_a_short_form_in_the_tests():
    tested = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for _, command, why in commands(page.read_text(encoding="utf-8")):
            if (found := BENCHMARK.match(command)) and not why:
                room, name = found.groups()
                folder = rf"benchmarks\.{room}" if room else "benchmarks"
                imported = rf"from {folder} import .*\b{name}\b|from {folder}\.{name} import"
                assert re.search(imported, tested), f"{page.name}: {command}"


def test_what_is_not_run_says_why():
    reasons = {why for page in PAGES for _, _, why in commands(page.read_text(encoding="utf-8")) if why}
    assert reasons and all(len(why) > 10 for why in reasons)
