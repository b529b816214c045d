"""The installed package, in an environment and a folder that know nothing of the checkout.

The folder has packages of the user's own named tools, trainer and pipeline, which fail when they are imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import framestream
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.paths import ROOT

#: as much of lmms-eval as the plug-in imports: the real one is tried by make peers
LMMS_EVAL = {
    "__init__.py": "",
    "api/__init__.py": "",
    "api/instance.py": "class Instance: pass\n",
    "api/model.py": "class lmms: pass\n",
    "models/__init__.py": "",
    "models/registry_v2.py": "def ModelManifest(*names, **paths): return paths\n",
}
LOAD_PLUGIN = """
import importlib, importlib.metadata
point, = importlib.metadata.entry_points(group="lmms_eval.models", name="framestream")
for path in point.load().values():
    module, _, name = path.rpartition(".")
    print(getattr(importlib.import_module(module), name).__name__)
"""
#: packages that this project was asked to stand on; flash-attn, which compiles for a GPU, is an extra
CHOSEN = {"torch", "webdataset", "transformers", "deepspeed", "decord2", "ffmpeg-python"}
CHOSEN |= {"huggingface_hub", "pyarrow", "tqdm"}
#: packages that are removed, and what is said to those who use them
REMOVED = {
    "webdataset": "stream_members needs the package webdataset (No module named 'webdataset'); pip install webdataset",
    "decord2": "error: data.decoder: decord needs the package decord2 (No module named 'decord'); pip install decord2",
    "ffmpeg-python": "error: data.decoder: ffmpeg needs the package ffmpeg-python (No module named 'ffmpeg'); "
    "pip install ffmpeg-python",
}
USE_REMOVED = """
import sys
from framestream.pipeline.adapters import ShardDataset  # needs none of them
try:
    from framestream.pipeline.adapters import stream_members
except ImportError as error:
    print(error, file=sys.stderr)
from framestream.tools import build_shards
for decoder in ("decord", "ffmpeg"):
    print(build_shards.main(["--stage", "2", "--manifest", sys.argv[1], "--set", f"data.decoder={decoder}"]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with a wheel of this checkout; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("install")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in ("framestream", "pipeline", "trainer", "tools", "manifests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-build-isolation", str(source)], check=True)
    return environment


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory) -> Callable[..., str]:
    """Run a program of the environment in the user's folder; returns what it prints."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("tools", "trainer", "pipeline"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('raise RuntimeError("the user\'s own package")\n', encoding="utf-8")
    for name, text in LMMS_EVAL.items():
        path = folder / "lmms_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
    }

    def call(*command: str) -> str:
        ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=250)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    return call


def test_the_installed_copy_is_used(run):
    where = run("python", "-c", "import framestream.trainer as t; print(t.__file__)")
    assert "site-packages/framestream/trainer" in where and str(ROOT) not in where
    assert run("framestream", "--version").split() == ["framestream", framestream.__version__]
    listed = run("python", "-c", "import importlib.metadata as m; print(*m.requires('framestream'), sep='\\n')")
    required = [Requirement(line) for line in listed.splitlines()]
    assert {item.name for item in required if item.marker is None} >= CHOSEN
    assert {item.name for item in required if item.marker and item.marker.evaluate({"extra": "flash"})} == {
        "flash-attn"
    }


def test_every_command_has_help(run):
    from framestream.cli import COMMANDS

    overview = run("framestream", "--help")
    for name in COMMANDS:
        assert f"  {name} " in overview
        assert run("framestream", name, "--help").startswith(f"usage: framestream {name}")


def test_the_page_of_the_server_is_shipped(run):
    code = "import os, framestream.trainer.serving as serving; print(*os.listdir(serving.__path__[0]))"
    assert {"page.css", "page.html", "page.js"} <= set(run("python", "-c", code).split())


def test_shipped_manifests_build_and_train(run):
    run("framestream", "demo-data", "--out", "demo/data", "--share", "0.01", "--workers", "2")
    assert "shards: demo/shards/stage1" in run("framestream", "build", "--stage", "1", "--manifest", "demo/stage1")
    small = ["--set", "train.max_steps=2", "--set", "batching.global_batch=4", "--set", "batching.row_multiple=1"]
    run("framestream", "train", "--manifest", "demo/stage1", *small)
    run("python", "-c", "import pathlib; assert pathlib.Path('demo/runs/stage1/final').is_dir()")


def test_the_plug_in_of_lmms_eval_is_found_and_imported(run):
    assert run("python", "-c", LOAD_PLUGIN).split() == ["SimpleModel", "ChatModel"]


def test_what_needs_a_removed_package_says_so_in_a_line(tmp_path):
    """The packages of the tests without three that the user may lack: their folders are not there at all."""
    removed = {path.parts[0] for name in REMOVED for path in importlib.metadata.files(name) or ()}
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name not in removed:
            (packages / path.name).symlink_to(path)
    corpus.video(tmp_path / "media" / "0.mp4")
    corpus.annotations(tmp_path / "all.jsonl", [{"id": "v", "video": "0.mp4", "conversations": corpus.TURNS}])
    entries = [{"annotation": str(tmp_path / "all.jsonl"), "root": str(tmp_path / "media")}]
    manifest = corpus.manifest(tmp_path / "stage2.yaml", entries)
    variables = {**os.environ, "PYTHONPATH": f"{packages}:{ROOT}"}
    command = [sys.executable, "-S", "-c", USE_REMOVED, str(manifest)]
    ended = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert (ended.stderr.splitlines(), ended.stdout.split()) == (list(REMOVED.values()), ["2", "2"])
    assert not (tmp_path / "shards").exists()
