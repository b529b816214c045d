"""The work folder of an interrupted build, damaged in each of its files: the result is always that of sound files."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from framestream.tools import build_shards
from framestream.tools.builder import finalize
from framestream.tools.common.errors import WorkerError
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.workers.in_process import use_this_process

SAMPLES = [
    *({"id": f"v{number}", "video": f"{number}.mp4", "conversations": TURNS} for number in range(2)),
    {"id": "i", "image": "0.png", "conversations": TURNS},
    {"id": "absent", "video": "absent.mp4", "conversations": TURNS},
    {"id": "t", "conversations": TEXT},
]
DAMAGE = {
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "cut": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "removed": None,
}


def build(folder: Path, out: str, *options: str) -> int:
    """Build FOLDER/OUT/stage2; with ``grown`` in its name from two annotation files."""
    entries = [{"annotation": str(folder / "a.jsonl"), "root": str(folder / "media")}]
    if "grown" in out:
        entries.append({"annotation": str(folder / "b.jsonl"), "root": str(folder / "media")})
    frames = {"sampler": "middle", "min": 2, "max": 4, "size": 64}
    model = {"vision_tower": {"patch": 8}}
    manifest = corpus.manifest(folder / f"{out}.yaml", entries, frames=frames, model=model)
    command = ["--stage", "2", "--manifest", str(manifest), "--workers", "1", "--out", str(folder / out)]
    return build_shards.main([*command, *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media, two roots that are finished (whole, grown), and four that were interrupted in their last steps."""
    folder = tmp_path_factory.mktemp("work")
    for number in range(3):
        corpus.video(folder / "media" / f"{number}.mp4", 1, seed=number)
    corpus.still(folder / "media" / "0.png")
    corpus.annotations(folder / "a.jsonl", SAMPLES)
    corpus.annotations(folder / "b.jsonl", [{"id": "later", "video": "2.mp4", "conversations": TURNS}])
    with pytest.MonkeyPatch.context() as patch:
        use_this_process(patch)
        assert build(folder, "whole") == 0
        shutil.copytree(folder / "whole", folder / "grown")
        assert build(folder, "grown") == 0
        for out in ("before", "within", "before-grown", "within-grown"):
            if "grown" in out:
                shutil.copytree(folder / "whole", folder / out)
            with pytest.MonkeyPatch.context() as stop:
                step = "_previous_infos" if "before" in out else "write_ledger"
                stop.setattr(finalize, step, lambda *arguments: interrupt())
                assert build(folder, out) == 1
    return folder


def interrupt():
    raise WorkerError("interrupted")


def files(folder: Path, out: str) -> list[str]:
    root = folder / out / "stage2"
    return sorted(path.relative_to(root).as_posix() for path in (root / "work").rglob("*") if path.is_file())


def test_the_work_folder_has_these_files(folder):
    plan = [f"work/plan/{name}" for name in ("dialogues.arrow", "ledger.arrow", "media.arrow", "record.json")]
    task = [
        f"work/tasks/{{}}-train-000000/{name}" for name in ("ledger.arrow", "record.json", "rows.arrow", "shard.tar")
    ]
    tasks = [name.format(kind) for kind in ("dialogue", "image", "video") for name in task]
    assert files(folder, "before") == ["work/outcomes.arrow", *plan, "work/plan/tasks.json", *tasks]
    moved = [name for name in tasks if not name.endswith(".tar")]
    assert files(folder, "within") == ["work/outcomes.arrow", *plan, "work/plan/tasks.json", *moved]


@pytest.mark.parametrize("out", ["before", "within", "before-grown", "within-grown"])
def test_damage_is_found_and_made_again(folder, monkeypatch, caplog, out):
    """The kinds of damage take turns; of an addition, only files that a first build does not have are damaged."""
    use_this_process(monkeypatch)
    sound = snapshot(folder / ("grown" if "grown" in out else "whole"))
    names = [name for name in files(folder, out) if "grown" not in out or "/previous/" in name]
    for name, damage in zip(names, itertools.cycle(DAMAGE), strict=False):
        copy = folder / f"{out}-{damage}"
        shutil.copytree(folder / out, copy)
        path = copy / "stage2" / name
        data = path.read_bytes()
        path.unlink()  # not in place: files of the plan may be links to those of the root
        if DAMAGE[damage]:
            path.write_bytes(DAMAGE[damage](data))
        caplog.clear()
        status = build(folder, copy.name)
        lost = "within" in out and "/previous/" in name
        assert status == (2 if lost else 0), name
        if not lost:
            assert snapshot(copy) == sound, name
            lines = [line for line in caplog.messages if "again" in line]
            assert bool(lines) == (name != "work/outcomes.arrow"), name
            assert all(str(copy) in line and "\n" not in line for line in lines)
        shutil.rmtree(copy)


def test_a_shard_that_was_moved_and_damaged_is_built_again(folder, monkeypatch, caplog):
    use_this_process(monkeypatch)
    shutil.copytree(folder / "within", folder / "moved")
    shard = folder / "moved" / "stage2" / "video" / "train-000000.tar"
    shard.write_bytes(DAMAGE["flipped"](shard.read_bytes()))
    assert build(folder, "moved") == 0
    assert snapshot(folder / "moved") == snapshot(folder / "whole") and "shard.tar: missing" in caplog.text


@pytest.mark.parametrize("name", ["shardindex.json", "train-000000.tar.idx"])
@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_lists_for_other_readers_are_made_again(folder, monkeypatch, caplog, name, damage):
    use_this_process(monkeypatch)
    copy = folder / f"lists-grown-{damage}-{name}"
    shutil.copytree(folder / "whole", copy)
    path = copy / "stage2" / "video" / name
    data = path.read_bytes()
    path.unlink()
    if DAMAGE[damage]:
        path.write_bytes(DAMAGE[damage](data))
    assert build(folder, copy.name) == 0
    assert snapshot(copy) == snapshot(folder / "grown")


@pytest.mark.parametrize(
    "name", ["build.json", "index/media.arrow", "index/dialogues.arrow", "index/shards.arrow", "ledger/ledger.parquet"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_root_is_not_extended(folder, monkeypatch, capsys, name, damage):
    use_this_process(monkeypatch)
    copy = folder / f"root-grown-{damage}-{Path(name).name}"
    shutil.copytree(folder / "whole", copy)
    path = copy / "stage2" / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = snapshot(copy)
    assert build(folder, copy.name) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and Path(name).name in error and "restore" in error
    assert snapshot(copy) == before


@pytest.mark.parametrize("name", ["index/media.arrow", "index/shards.arrow", "video/train-000000.tar"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_root_is_not_called_finished(folder, monkeypatch, capsys, name, damage):
    use_this_process(monkeypatch)
    copy = folder / f"finished-{damage}-{Path(name).name}"
    shutil.copytree(folder / "whole", copy)
    path = copy / "stage2" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    before = snapshot(copy)
    for options in ((), ("--retry-failed",)):
        assert build(folder, copy.name, *options) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and Path(name).name in error and f"remove {copy / 'stage2'} and" in error
        assert snapshot(copy) == before
