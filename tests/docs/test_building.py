"""docs/building.md: its commands run in their order, and what it lists is what the code has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from framestream.pipeline.config.yaml_files import read_yaml
from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import RETRYABLE, read_ledger
from framestream.tools.builder.build_spec import LIBRARIES
from framestream.tools.fetch.registry import SOURCE_FORMS, check_archives
from framestream.tools.fetch.url import UrlTemplate
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.documents import commands
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "building.md").read_text(encoding="utf-8")


def fenced(language: str, holding: str) -> str:
    """The fenced block of a language that holds a text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.S | re.M)
    (block,) = [block for block in blocks if holding in block]
    return block


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder like the project's, with the page's own files; one of its videos is not there yet."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("manifests", "tools", "pipeline", "docs"):
        (folder / name).symlink_to(ROOT / name)
    media = folder / "mine" / "media"
    corpus.video(media / "a.mp4", seconds=4)
    corpus.still(media / "c.jpg")
    (folder / "mine" / "train.jsonl").write_text(fenced("jsonl", "a.mp4"))
    (folder / "mine.yaml").write_text(fenced("yaml", "extends:"))
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def environment(project: Path) -> dict[str, str]:
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    packages = os.pathsep.join(filter(None, sys.path))
    own = {"PATH": path, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(project / "cache")}
    return {**os.environ, **own}


def run(project: Path, command: str) -> str:
    ran = subprocess.run(shlex.split(command), cwd=project, env=environment(project), capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stderr}"
    return ran.stdout


def test_every_command_of_the_page_runs_in_its_order(project):
    root = project / "shards" / "mine" / "stage3"
    said: dict[str, list[str]] = {}
    before: dict[str, str] = {}
    for heading, command, why in commands(PAGE):
        if why:
            continue
        if heading == "Trying failures again":
            assert [row["reason"] for row in read_ledger(root).to_pylist()] == ["missing_file"] * 2
            corpus.video(project / "mine" / "media" / "b.mp4", seed=1)
        if heading == "Adding annotation files":
            assert not read_ledger(root).to_pylist()
            before = snapshot(root)
            (project / "mine" / "more.jsonl").write_text(fenced("jsonl", "a.mp4"))
            entry = re.search(r"^    - \{annotation: mine/train.*\n", fenced("yaml", "extends:"), re.M)[0]
            text = (project / "mine.yaml").read_text()
            (project / "mine.yaml").write_text(text.replace(entry, fenced("yaml", "mine/more.jsonl") + entry))
        if heading == "The dry run" and not (project / "roots.yaml").exists():
            shutil.copyfile(ROOT / "manifests" / "roots.example.yaml", project / "roots.yaml")
        said.setdefault(heading, []).append(run(project, command))
    after = snapshot(root)
    tars = {name for name in before if name.endswith(".tar")}
    assert tars and all(after[name] == before[name] for name in tars) and len(Index.open(root).dialogues) == 8
    assert "104 entries" in said["The dry run"][0]
    assert "other machines still build" in said["Many machines, without any cluster software"][0]
    assert "shards: " in said["Many machines, without any cluster software"][1]
    assert all((project / name).is_file() for name in ("plan/plan.html", "plan/plan.parquet", "inspection.html"))


def test_the_slurm_script_gives_each_job_its_rank(tmp_path):
    """As Slurm would run it for an array from 3 to 4, with a python that shows what it is given."""
    line = next(command for _, command, _ in commands(PAGE) if command.startswith("sbatch"))
    script = next(word for word in shlex.split(line) if word.endswith(".sbatch"))
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s|" "$(pwd)" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    for number, rank in (("3", "0"), ("4", "1")):
        own = {**slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": number}
        command = ["bash", str(ROOT / script), "--stage", "3", "--set", "a.b=c d"]
        said = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        options = ["--stage", "3", "--set", "a.b=c d", "--rank", rank, "--of", "2", ""]
        assert said.split("|") == [str(tmp_path), "tools/build_shards.py", *options]


def test_commands_that_are_not_run_exist():
    """What cannot be run here names options and files that are there."""
    for _, command, why in commands(PAGE):
        if why and "build" in command:
            words = shlex.split(command)
            source = (ROOT / "tools" / "build_shards.py").read_text()
            assert all(f'"{word}"' in source for word in words if word.startswith("--") and word != "--array"), command
            assert all((ROOT / word).is_file() for word in words if word.endswith((".py", ".sbatch"))), command
    assert {why for _, _, why in commands(PAGE)} != {""}


def test_the_page_lists_what_may_be_tried_again():
    listed = re.search(r"failed for a reason that may have passed: (.*?)\. ", " ".join(PAGE.split()))[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(RETRYABLE)


def test_the_page_lists_the_libraries_that_decide_bytes():
    listed = re.search(r"the version of (.*?), or the processor's", " ".join(PAGE.split()))[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(LIBRARIES)


def test_the_root_map_of_the_page_has_places_of_every_kind(tmp_path):
    (tmp_path / "roots.yaml").write_text(fenced("yaml", "owner/name@v1"))
    places = read_yaml(tmp_path / "roots.yaml")
    for place in places.values():
        if isinstance(place, dict):
            check_archives(place)
        elif place.startswith(("url:", "page:")):
            kind, _, address = place.partition(":")
            assert "pass@" not in UrlTemplate(kind, address).redacted
    # the page has every kind of location
    kinds = {place.partition(":")[0] for place in places.values() if isinstance(place, str)}
    assert kinds == set(re.findall(r"\b([a-z][a-z0-9]*):(?!//HOST)", SOURCE_FORMS)), (
        "the page's root map has every kind of location"
    )
    named = set().union(*(place for place in places.values() if isinstance(place, dict)))
    assert named == {"archives", "join", "inside"}
    example = yaml.safe_load((ROOT / "manifests" / "roots.example.yaml").read_text(encoding="utf-8"))
    assert all(isinstance(place, (str, dict)) for place in example.values())
