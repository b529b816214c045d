"""Files of the token cache: damage is mended, read-only roots have theirs in loader.cache, old ones are read."""

from __future__ import annotations

import builtins
import contextlib
import errno
import logging
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from framestream.pipeline import build_loader
from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.tokenization import token_files as module
from framestream.pipeline.tokenization.token_files import SCHEMA, open_or_write_tokens, open_tokens
from framestream.pipeline.utils.locks import LocksUnsupportedError
from tests.helpers.corpora.small_root import manifest, mixed_root
from tests.helpers.paths import ROOT
from tests.helpers.workers.token_worker import FINGERPRINT, ROWS, Recorder, tokenize


def read(*folders: Path, tokenize=tokenize) -> list[dict]:
    return open_or_write_tokens(folders, FINGERPRINT, len(ROWS), tokenize).table.to_pylist()


def never(*_):
    pytest.fail("tokenized again")


@pytest.fixture
def small_parts(monkeypatch):
    """Make each row a part, in two processes."""
    monkeypatch.setattr(module, "PART_ROWS", 1)
    monkeypatch.setattr(module, "PARTS_PER_PROCESS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


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
        assert read(path.parent, tokenize=never) == ROWS
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


@pytest.mark.parametrize("locks", [True, False])
def test_ranks_of_a_machine_make_one_cache(path, monkeypatch, locks):
    """Without locks several may write it, and each removes the parts of the others."""
    calls, original, data = [], module._write, path.read_bytes()
    monkeypatch.setattr(module, "_write", lambda *arguments: calls.append(1) or original(*arguments))
    monkeypatch.setattr(module, "PART_ROWS", 1)
    if not locks:
        monkeypatch.setattr(module, "lock_file", lambda *_, **__: _no_locks())
    for folder in (path.parent, path.parent.parent / "cache"):
        calls.clear()
        path.unlink(missing_ok=True)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda _, folder=folder: read(folder), range(4))) == [ROWS] * 4
        (found,) = folder.iterdir()
        assert found.read_bytes() == data and (len(calls) == 1 or not locks)


@contextlib.contextmanager
def _no_locks():
    raise LocksUnsupportedError("none here")
    yield


def test_killed_at_any_part_it_goes_on_with_the_next(path):
    data, folder, log = path.read_bytes(), path.parent, path.parent.parent / "log"
    path.unlink()
    worker = f"from {Recorder.__module__} import die_in_second_part; die_in_second_part({str(folder)!r})"
    codes = [subprocess.run([sys.executable, "-c", worker], cwd=ROOT).returncode for _ in ROWS]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert log.read_text().split() == ["0", "1", "1", "2", "2"]
    assert path.read_bytes() == data and not list(folder.glob("*.part"))


def test_bytes_do_not_depend_on_the_number_of_processes(path, small_parts, monkeypatch):
    data, log = path.read_bytes(), path.parent.parent / "log"
    path.unlink()
    assert read(path.parent, tokenize=Recorder(log)) == ROWS
    assert path.read_bytes() == data and sorted(log.read_text().split()) == ["0", "1", "2"]


def test_a_process_that_dies_is_one_line_and_costs_its_part(path, small_parts):
    folder, log = path.parent, path.parent.parent / "log"
    path.unlink()
    with pytest.raises(ShardsError, match="process [0-9]+ that tokenizes was ended by SIGKILL; run the same") as raised:
        read(folder, tokenize=Recorder(log, kill_at=2))
    assert "\n" not in str(raised.value)
    kept = [file for file in folder.iterdir() if file.suffix == ".part"]
    log.unlink()
    assert kept and read(folder, tokenize=Recorder(log)) == ROWS
    assert len(log.read_text().split()) == len(ROWS) - len(kept) and not list(folder.glob("*.part"))


def test_an_error_in_a_process_is_raised_here(path, small_parts):
    path.unlink()
    with pytest.raises(ManifestError, match="text.tokenizer: is bad"):
        read(path.parent, tokenize=Recorder(path.parent.parent / "log", fail_at=1))


def test_damaged_parts_are_named_and_made_again(path, monkeypatch, caplog):
    data, folder, rng, log = path.read_bytes(), path.parent, random.Random(5), path.parent.parent / "log"
    monkeypatch.setattr(module, "PART_ROWS", 1)
    for _ in range(20):
        path.unlink()
        with pytest.raises(ManifestError):
            read(folder, tokenize=Recorder(log, fail_at=2))
        (first, second), _ = sorted(folder.iterdir()), (caplog.clear(), log.unlink())
        first.write_bytes(damage(rng, first.read_bytes()))
        assert read(folder, tokenize=Recorder(log)) == ROWS and log.read_text().split() == ["0", "2"]
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert record.getMessage().startswith(f"{first}: ") and "tokenized again" in record.getMessage()
        assert path.read_bytes() == data and list(folder.iterdir()) == [path] and second != path


def test_what_killed_processes_left_is_removed(path):
    part, old, new = (path.with_name(f"tokens-{FINGERPRINT}.{name}") for name in ("0-0.part", "a.tmp", "b.tmp"))
    for file in (part, old, new):
        file.touch()
    os.utime(old, (0, 0))
    assert read(path.parent, tokenize=never) == ROWS and not part.exists()
    path.unlink()
    assert read(path.parent) == ROWS and sorted(path.parent.iterdir()) == sorted([path, new])
