"""Bad and unusual inputs in one build: each gives its ledger reason or the right frames, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TURNS
from tests.helpers.corpora.odd_cases import FRAMES, LOCAL, Case, Shown
from tests.helpers.corpora.snapshot import members
from tests.helpers.paths import BUILD_SHARDS

#: Cases by the place that their media are in; each place is an entry of the manifest.
CASES: dict[str, dict[str, Case]] = {"local": LOCAL}


@dataclass(frozen=True)
class Built:
    """One build of all cases."""

    base: Path
    root: Path
    ran: subprocess.CompletedProcess
    around: tuple[dict, dict]  #: what lay in ``base`` beside the root, before and after
    ledger: list[dict]
    index: Index
    members: dict[str, dict]  #: of the tars, as webdataset reads them


def lying(base: Path) -> dict[str, tuple]:
    """Everything below a folder but the shards: kind, mode, time of change and contents."""
    found = {}
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if Path(folder, name) != base / "shards"]
        for name in [*folders, *names]:
            path = Path(folder) / name
            state = path.lstat()
            regular = stat.S_ISREG(state.st_mode)
            contents = hashlib.sha256(path.read_bytes()).hexdigest() if regular else ""
            found[str(path)] = (state.st_mode, state.st_mtime_ns, contents)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    base = tmp_path_factory.mktemp("bad")
    for name in ("local", "secret", "home", "temporary", "here"):
        (base / name).mkdir()
    corpus.video(base / "secret" / "secret.mp4")
    corpus.still(base / "secret" / "secret.jpg")
    entries = []
    for place, cases in CASES.items():
        for case in cases.values():
            if case.make:
                case.make(base / place / case.name)
        samples = [
            {"id": name, case.kind: case.name, **case.fields, "conversations": TURNS} for name, case in cases.items()
        ]
        annotation = corpus.annotations(base / f"{place}.jsonl", samples)
        entries.append({"annotation": str(annotation), "root": f"../{place}"})
    data = {"entries": entries, "shard_mb": 1, "decode_timeout": 60}
    manifest = corpus.manifest(base / "stage2.yaml", entries, frames=FRAMES, data=data)
    environment = {**os.environ, "PYTHONPATH": "", "HOME": str(base / "home"), "TMPDIR": str(base / "temporary")}
    command = [sys.executable, "-B", str(BUILD_SHARDS), "--stage", "2", "--manifest", str(manifest), "--workers", "2"]
    before = lying(base)
    ran = subprocess.run(command, cwd=base / "here", env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    root = base / "shards" / "stage2"
    read = {key: sample for name in ("video", "image", "dialogue") for key, sample in members(root, name).items()}
    return Built(base, root, ran, (before, lying(base)), read_ledger(root).to_pylist(), Index.open(root), read)


def test_the_build_succeeds_with_a_summary(built: Built) -> None:
    table = {line.split()[0]: line for line in built.ran.stdout.splitlines() if line.strip()}
    for place, cases in CASES.items():
        refused = Counter(case.expected for case in cases.values() if isinstance(case.expected, str))
        assert f" {len(cases)} " in table[place]
        for reason in refused:
            assert reason in built.ran.stdout


def test_nothing_changes_around_the_shards(built: Built) -> None:
    before, after = built.around
    assert after == before
    assert [path.name for path in (built.base / "shards").iterdir()] == ["stage2"]


def test_every_dialogue_is_in_a_shard_or_in_the_ledger(built: Built) -> None:
    written = [json.loads(sample["json"]) for key, sample in built.members.items() if key.startswith("d")]
    rows = [row for row in built.ledger if row["kind"] == "dialogue"]
    found = [(item["entry"], item["id"]) for item in written] + [(row["entry"], row["dialogue"]) for row in rows]
    planned = [(place, name) for place, cases in CASES.items() for name in cases]
    assert Counter(found) == Counter(planned) and len(planned) >= 60


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, cases in CASES.items() for name in cases])
def test_input_ends_in_its_reason_or_its_frames(built: Built, place: str, name: str) -> None:
    case = CASES[place][name]
    rows = [row for row in built.ledger if row["entry"] == place]
    reasons = [row["reason"] for row in rows if row["dialogue"] == name]
    if isinstance(case.expected, str):
        keys = {row["key"] for row in rows if row["dialogue"] == name}
        causes = [row["message"] for row in rows if row["dialogue"] == name or row["key"] in keys]
        assert reasons == [case.expected], causes
        assert all(message and "\n" not in message and str(built.base) not in message for message in causes)
        return
    assert not reasons, [row["message"] for row in rows if row["source"].endswith(case.name)]
    shown = look_up(built, place, name)
    case.expected(shown)
    marked = {row["key"] for row in rows if row["kind"] == "salvaged"}
    assert (shown.row["key"] in marked) == shown.facts["salvaged"]


def look_up(built: Built, place: str, name: str) -> Shown:
    """What the shards hold of a case."""
    dialogue = next(row for row in built.index.dialogues.to_pylist() if (row["entry"], row["id"]) == (place, name))
    row = built.index.media.slice(dialogue["media"][0], 1).to_pylist()[0]
    frames = []
    with open(built.index.shard_path(row["shard"]), "rb") as shard:
        for offset, size in zip(row["frame_offset"], row["frame_size"], strict=True):
            shard.seek(offset)
            frames.append(np.asarray(Image.open(io.BytesIO(shard.read(size))).convert("RGB")))
    sample = built.members[row["key"]]
    data = sample["jpg" if row["kind"] == "image" else "mp4"]
    source = built.base / place / CASES[place][name].name
    return Shown(source, frames, row, json.loads(sample["json"]), data)
