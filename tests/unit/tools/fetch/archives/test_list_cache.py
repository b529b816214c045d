"""Damage in cached lists and gzip indexes: they are made again, with one line in the log."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from framestream.tools.fetch.archives.list_cache import open_index
from tests.helpers.media.memory_files import content, opened, pack

FILES = {f"v/{number}.mp4": bytes([number]) * 3000 for number in range(40)}


def damaged(data: bytes, seed: int) -> bytes:
    """Return ``data`` cut, or with some bytes replaced, or something else."""
    draw = random.Random(seed)
    kind = seed % 4
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind == 1:
        return draw.randbytes(draw.randrange(200))
    changed = bytearray(data)
    for _ in range(1 if kind == 2 else 20):
        changed[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    return bytes(changed)


@pytest.mark.parametrize("suffix", [".arrow", ".gzip", ".json"])
def test_damaged_files_are_made_again(tmp_path, caplog, suffix):
    data, work = pack(FILES, "tar.gz"), tmp_path / "cache"
    assert content(opened(data, work=work), "v/7.mp4", tmp_path) == FILES["v/7.mp4"]
    (path,) = work.glob(f"*{suffix}")
    sound = path.read_bytes()
    for seed in range(40):
        path.write_bytes(damaged(sound, seed))
        caplog.clear()
        assert content(opened(data, work=work), "v/7.mp4", tmp_path) == FILES["v/7.mp4"]
        (line,) = caplog.messages
        assert str(path) in line and "\n" not in line
        assert line.endswith("; the archive is listed again") or "has no digest" in line
        caplog.clear()
        opened(data, work=work)
        assert not caplog.messages


def test_an_index_that_is_damaged_meanwhile_is_made_again(tmp_path):
    data, work = pack(FILES, "tar.gz"), tmp_path / "cache"
    source = opened(data, work=work)
    (index,) = work.glob("*.gzip")
    index.write_bytes(bytes(1000))
    assert content(source, "v/7.mp4", tmp_path) == FILES["v/7.mp4"]
    several = opened(data, pack({"b": b"b"}, "ustar"), work=work)
    index.unlink()
    assert content(several, "v/8.mp4", tmp_path) == FILES["v/8.mp4"]


@pytest.mark.parametrize(
    "record", ["{}", "[]", "5", '{"index": 1, "table": 2}', '{"index": "", "table": null}', "[" * 9999]
)
def test_records_with_other_contents(tmp_path, record):
    data, work = pack(FILES, "tar.gz"), tmp_path / "cache"
    opened(data, work=work)
    (path,) = work.glob("*.json")
    path.write_text(record)
    assert open_index(work, path.stem) is None
    assert content(opened(data, work=work), "v/7.mp4", tmp_path) == FILES["v/7.mp4"]
    assert len(json.loads(path.read_text())["table"]) == 16


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    work = Path(tmp_path / "cache")
    assert content(opened(pack(FILES, "tar.gz"), work=work), "v/7.mp4", tmp_path) == FILES["v/7.mp4"]
