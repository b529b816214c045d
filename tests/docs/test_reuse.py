"""docs/reuse.md: every example is run on a built root, and what it prints is right."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from framestream.tools import export_dataset
from tests.helpers.corpora.real_root import build
from tests.helpers.model.torchvision_import import import_torchvision
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

import_torchvision()  # before anything imports transformers

PAGE = (ROOT / "docs" / "reuse.md").read_text(encoding="utf-8")
HUB_NAME = '"Qwen/Qwen3-VL-8B-Instruct"'
SHOWN = "torch.Size([8, 112, 112, 3])"

#: heading, the module that it needs, and what is printed by its example
EXAMPLES = [
    ("PyTorch", "torch", [SHOWN + r" \[0.88, .*\]", r"\[{'from': 'human', 'value': .*}\]", "6 5"]),
    (
        "Hugging Face processors",
        "torchvision",
        [r"{'role': 'user', 'content': \[{'type': 'video'}, .*", ".*'labels'.*'video_grid_thw'.*"],
    ),
    ("The Trainer of transformers", "torchvision", [r"\{'train_runtime': .*"]),
    ("TRL", "trl", [r"\{'train_runtime': .*"]),
    ("Lightning", "lightning", ["3"]),
    ("accelerate", "torchvision", [r"5\.[4-8]\d\d"] * 3),
    ("webdataset", "webdataset", [r"[012] .*"] * 8 + [SHOWN + " 2", SHOWN + " 1", SHOWN + " 2"]),
    ("wids", "wids", ["3 " + SHOWN]),
    ("datasets", "datasets", ["3 " + SHOWN]),
    ("Megatron-Energon", "megatron", [SHOWN + r" torch.Size\(\[8\]\) [12]"] * 3),
]
#: runs example.py, in the peers' environment with torchvision imported first
RUN = """
import runpy
from tests.helpers.model.torchvision_import import import_torchvision
import_torchvision()
runpy.run_path("example.py", run_name="__main__")
"""
#: modules of the extra ``peers``, and the packages that they are in
PEERS = {
    **{name: name for name in ("torchvision", "datasets", "trl", "lightning")},
    "megatron": "megatron-energon",
}
SHELL = ["Megatron-Energon", "File-based trainers"]  #: headings whose shell block is run
MOST_LINES = 8  #: of an example for a trainer that takes what this package gives


def example(heading: str, language: str = "python") -> str:
    """The only block of a language below a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)[1]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.S | re.M)
    return block


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which shards/stage3 is a built root."""
    folder = tmp_path_factory.mktemp("reuse")
    root = build(folder / "built")
    (folder / "shards").mkdir()
    (folder / "shards" / "stage3").symlink_to(root)
    return folder


def test_every_block_is_run():
    """A block of any kind, wherever it stands on the page, is one of those that the other tests run."""
    fences = re.findall(r"^[ >]*(`{3,}|~{3,})[ {.]*([\w+-]*).*\n((?:.*\n)*?)[ >]*\1 *$", PAGE, re.M)
    run = [("python", example(heading)) for heading, *_ in EXAMPLES]
    run += [("sh", example(heading, "sh")) for heading in SHELL]
    assert sorted((language, code) for _, language, code in fences) == sorted(run)
    assert len(re.findall("```|~~~", PAGE)) == 2 * len(run)
    assert all(ast.parse(code) for language, code in run if language == "python")


def test_the_peers_of_the_examples_are_installed():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^peers = \[\n(.*?)^\]", pyproject, re.S | re.M)[1]
    assert set(PEERS.values()) <= set(re.findall(r'"([\w-]+)>=', extra))


@pytest.mark.parametrize("heading", ["The Trainer of transformers", "TRL"])
def test_trainers_take_few_lines(heading):
    lines = [line for line in example(heading).splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES and not any(";" in line for line in lines)


@pytest.mark.parametrize(
    ("heading", "needs", "printed"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.peers] * (case[1] in PEERS)) for case in EXAMPLES],
)
def test_example(place, heading, needs, printed):
    if not importlib.util.find_spec(needs):
        pytest.skip(f"{needs} is not installed")
    code = example(heading)
    if HUB_NAME in code:
        from tests.helpers.model.chat_models import chat_model
        from tests.helpers.model.processors import processor

        processor("qwen3_vl").save_pretrained(place / "processor")
        chat_model("qwen3_vl").save_pretrained(place / "processor")
        code = code.replace(HUB_NAME, '"processor"')
        code = code.replace('SFTConfig("out", ', 'SFTConfig("out", use_cpu=True, bf16=False, ')  # its default is bf16
    (place / "example.py").write_text(code, encoding="utf-8")
    cache = {"HF_HOME": str(place / "cache"), "WIDS_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN]
    run = subprocess.run(command, cwd=place, env={**os.environ, **cache}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    if needs == "lightning":
        del lines[: -len(printed)]  # its table of layers, and its progress
    wanted = [line.replace(SHOWN, re.escape(SHOWN)) for line in printed]
    assert len(lines) == len(wanted)
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def test_export_command(place, monkeypatch):
    monkeypatch.chdir(place)
    program, script, *arguments = shlex.split(example("File-based trainers", "sh"))
    assert (program, script) == ("python", "tools/export_dataset.py") and export_dataset.main(arguments) == 0
    for split, count in (("train", 8), ("val", 1)):
        assert len((place / "exported" / f"{split}.jsonl").read_text().splitlines()) == count


@pytest.mark.peers
def test_energon_info(place):
    if not importlib.util.find_spec("megatron"):
        pytest.skip("megatron is not installed")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-ec", example("Megatron-Energon", "sh")]
    said = subprocess.run(command, cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "4 samples" in said.stdout and "in 2 shards" in said.stdout
