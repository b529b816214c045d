"""Files of the token cache: damage is mended, read-only roots have theirs in loader.cache, old ones are read."""

from __future__ import annotations

import builtins
import errno
import logging
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from framestream.pipeline import build_loader
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.tokenization import token_files as module
from framestream.pipeline.tokenization.token_files import SCHEMA, open_or_write_tokens, open_tokens
from tests.helpers.corpora.small_root import manifest, mixed_root

FINGERPRINT = "ab" * 16
ROWS = [
    {"ids": [5, -200, 7, 9], "labels": [-100, -100, -100, 9], "length": 67, "clips": 0, "tiles": 1, "learned": 1},
    {"ids": [3, 4], "labels": [-100, 4], "length": 2, "clips": 0, "tiles": 0, "learned": 1},
    {"ids": [], "labels": [], "length": 0, "clips": 0, "tiles": 0, "learned": 0},
]
ROWS = [row | {"error": "" if row["ids"] else "no answer"} for row in ROWS]


def batches():
    yield module.pa.RecordBatch.from_pylist(ROWS[:2], schema=SCHEMA)
    yield module.pa.RecordBatch.from_pylist(ROWS[2:], schema=SCHEMA)


def read(*folders: Path) -> list[dict]:
    return open_or_write_tokens(folders, FINGERPRINT, len(ROWS), batches).table.to_pylist()


def never():
    pytest.fail("tokenized again")


@pytest.fixture
def path(tmp_path) -> Path:
    """Return a sound file in tmp_path/index."""
    (tmp_path / "index").mkdir()
    assert read(tmp_path / "index", tmp_path / "cache") == ROWS
    (path,) = (tmp_path / "index").iterdir()
    return path


def refuse(monkeypatch, folder: Path, error: int) -> None:
    """Let nothing be written below ``folder``."""

    def open_unless_there(name, mode="r", *args, **kwargs):
        if Path(os.fspath(name)).is_relative_to(folder) and set(mode) & set("wax+"):
            raise OSError(error, os.strerror(error), str(name))
        return original(name, mode, *args, **kwargs)

    original = builtins.open
    monkeypatch.setattr(builtins, "open", open_unless_there)


def damage(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    kinds = (
        data[:at],
        data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        data + bytes(rng.randrange(1, 9)),
    )
    return rng.choice(kinds)


def test_each_damage_is_one_line_and_the_cache_is_made_again(path, caplog):
    data, rng, folder = path.read_bytes(), random.Random(3), path.parent
    for _ in range(60):
        path.write_bytes(damage(rng, data))
        caplog.clear()
        assert read(folder, folder.parent / "cache") == ROWS
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{path}: ") and "made again" in record.getMessage()
        assert "\n" not in record.getMessage() and path.read_bytes() == data and list(folder.iterdir()) == [path]


def test_a_file_without_digest_is_read_if_its_rows_agree(path, caplog):
    old = path.rename(path.with_name(f"tokens-{FINGERPRINT}.arrow"))
    for _ in range(2):
        assert open_or_write_tokens([path.parent], FINGERPRINT, len(ROWS), never).table.to_pylist() == ROWS
    assert [record.getMessage() for record in caplog.records] == [
        f"{old}: has no digest, as in older versions; damage here may go unnoticed"
    ]
    data, rng, other = old.read_bytes(), random.Random(4), 0
    for _ in range(150):
        old.write_bytes(damage(rng, data))
        try:
            other += open_tokens(old, len(ROWS)).table.to_pylist() != ROWS
        except ValueError as error:
            assert str(error).startswith(f"{old}: ") and "\n" not in str(error)
    assert other <= 5  # ids without a label, and clips against tiles, can only be told by a digest


@pytest.mark.parametrize(
    "change",
    [
        {"ids": [5, -7, 7, 9]},
        {"labels": [-100, -100, 9]},
        {"labels": [-100, -100, -100, 8]},
        {"labels": [-100, 5, 7, 9]},
        {"length": 68},
        {"clips": -1, "tiles": 2},
        {"learned": 2},
        {"error": None},
        {"labels": None},
        {"ids": [5, None, 7, 9]},
    ],
)
def test_rows_that_contradict_each_other_are_refused(tmp_path, change):
    rows = [ROWS[1], ROWS[0] | change]
    path = tmp_path / "tokens-00.arrow"
    with module.pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_batch(module.pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    with pytest.raises(ValueError, match="tokens-00.arrow: damaged"):
        open_tokens(path, 2)


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_root_has_its_cache_elsewhere(tmp_path, monkeypatch, caplog, error):
    root, cache = mixed_root(tmp_path / "root", 1), tmp_path / "cache"
    made = manifest(root, loader__cache=str(cache))
    expected = [batch.input_ids.tolist() for batch in build_loader(made)]
    (cached,) = (root / "stage2" / "index").glob("tokens-*")
    cached.unlink()
    refuse(monkeypatch, root, error)
    assert [batch.input_ids.tolist() for batch in build_loader(made)] == expected
    (line,) = [record.getMessage() for record in caplog.records if "token cache" in record.getMessage()]
    (moved,) = cache.glob("roots/*/tokens-*.arrow")
    assert str(root) in line and os.strerror(error) in line and line.endswith(f"the token cache is {moved}")
    monkeypatch.setattr(module, "_write", lambda *_: never())
    assert [batch.input_ids.tolist() for batch in build_loader(made)] == expected


def test_a_damaged_cache_in_a_read_only_root_is_replaced_elsewhere(path, monkeypatch, caplog):
    cache = path.parent.parent / "cache"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(monkeypatch, path.parent, errno.EROFS)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    assert read(path.parent, cache) == ROWS
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    monkeypatch.setattr(module, "_write", lambda *_: never())
    assert read(path.parent, cache) == ROWS


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_an_error_that_names_the_folder(path, monkeypatch, error):
    path.unlink()
    refuse(monkeypatch, path.parent, error)
    with pytest.raises(ShardsError, match=f"{path.parent}: cannot be written .{os.strerror(error)}") as raised:
        read(path.parent, path.parent.parent / "cache")
    assert "\n" not in str(raised.value)


def test_where_nothing_can_be_written_both_folders_are_named(path, monkeypatch):
    path.unlink()
    refuse(monkeypatch, path.parent.parent, errno.EROFS)
    with pytest.raises(ShardsError, match=f"{path.parent}: .*{path.parent.parent / 'cache'}: .*loader.cache"):
        read(path.parent, path.parent.parent / "cache")


def test_ranks_of_a_machine_make_one_cache(tmp_path, monkeypatch):
    calls, original = [], module._write
    monkeypatch.setattr(module, "_write", lambda *arguments: calls.append(1) or original(*arguments))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read(tmp_path / "cache"), range(4))) == [ROWS] * 4
    assert len(calls) == 1
