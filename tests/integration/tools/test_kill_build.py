"""A build killed at any moment and repeated has the bytes of an uninterrupted build."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import pytest

from benchmarks.soak.build import BuildCampaign
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.paths import BUILD_SHARDS
from tests.helpers.processes import kill_when
from tests.helpers.servers.web_server import Server

STEPS = ("work/plan.tmp", "work/tasks", "work/outcomes.arrow", "video/train-000001.tar", "index", "ledger")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that gives the command for an output folder."""
    folder = tmp_path_factory.mktemp("kill")
    samples = [{"id": 0, "video": "missing.mp4", "conversations": TURNS}]
    for number in range(20):
        corpus.video(folder / "media" / f"{number}.mp4", seconds=2, seed=number)
        corpus.still(folder / "media" / f"{number}.png", seed=number)
        samples.append({"id": f"v{number}", "video": f"{number}.mp4", "conversations": TURNS})
        samples.append({"id": f"i{number}", "image": f"{number}.png", "conversations": TURNS})
        samples.append({"id": f"t{number}", "conversations": TEXT})
    (folder / "media" / "page.mp4").write_text("<html>")
    samples.append({"id": "page", "video": "page.mp4", "conversations": TURNS})
    corpus.annotations(folder / "all.jsonl", samples)
    held = [{"id": 1, "video": "1.mp4", "start": 1, "conversations": TURNS}, {"id": 2}]
    corpus.annotations(folder / "held.json", held)
    entries = [
        {"annotation": str(folder / "all.jsonl"), "root": str(folder / "media")},
        {"annotation": str(folder / "held.json"), "root": str(folder / "media"), "split": "val"},
    ]
    path = corpus.manifest(folder / "stage2.yaml", entries)

    def command(out, workers=2):
        fixed = [sys.executable, str(BUILD_SHARDS), "--stage", "2", "--manifest", str(path)]
        return [*fixed, "--workers", str(workers), "--out", str(out)]

    return command


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """What an uninterrupted build by one worker leaves."""
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(build(out, workers=1), check=True, capture_output=True)
    found = snapshot(out)
    assert len([name for name in found if name.endswith(".tar")]) > 6
    return found


def test_killed_at_every_step_in_turn(build, whole, tmp_path):
    root = tmp_path / "stage2"
    killed = 0
    for step in STEPS:
        killed += kill_when(build(tmp_path), (root / step).exists)
    ran = subprocess.run(build(tmp_path), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert killed >= 3, "the build was never stopped on its way"
    assert snapshot(tmp_path) == whole


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(build, whole, tmp_path, seed):
    """Moments are drawn in numbers of files that have come to be, which is progress on any machine."""
    moments = random.Random(seed)
    root = tmp_path / "stage2"
    for _ in range(2):
        target = sum(1 for _ in root.rglob("*")) + moments.randint(1, 25)
        kill_when(build(tmp_path), lambda target=target: sum(1 for _ in _walk(root)) >= target)
    ran = subprocess.run(build(tmp_path), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert snapshot(tmp_path) == whole


def test_folders_archives_and_a_web_server(tmp_path):
    """A short campaign of benchmarks/soak/build.py, which compares, counts and verifies what comes out."""
    with Server() as server:
        campaign = BuildCampaign(tmp_path, server, media=2, workers=2)
        campaign.run(seed=0, kills=4)
    assert campaign.kills.total() == 4 and campaign.kills["all"]


def _walk(folder):
    return itertools.chain.from_iterable((*folders, *files) for _, folders, files in os.walk(folder))


def test_another_manifest_is_refused_where_a_build_is_unfinished(build, whole, tmp_path):
    assert kill_when(build(tmp_path), (tmp_path / "stage2" / "work" / "tasks").exists)
    other = subprocess.run([*build(tmp_path), "--set", "frames.quality=50"], capture_output=True, text=True)
    assert other.returncode == 2 and "frames.quality was 90 and is now 50" in other.stderr
    subprocess.run(build(tmp_path), check=True, capture_output=True)
    assert snapshot(tmp_path) == whole
