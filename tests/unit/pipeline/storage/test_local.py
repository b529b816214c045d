"""Folders: files that became stale or were replaced are opened again once."""

from __future__ import annotations

import errno
import os

import pytest

from framestream.pipeline.storage import ReadOptions, ShardRef, open_storage
from framestream.pipeline.storage import local as module

FILE = ShardRef("video/a.tar", 8, "")


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "video").mkdir()
    (tmp_path / FILE.name).write_bytes(b"01234567")
    return open_storage(tmp_path, ReadOptions(cache=str(tmp_path / "cache")))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EBADF, errno.EIO])
def test_a_stale_file_is_opened_again_once(storage, monkeypatch, number):
    failures, original = [], os.pread

    def pread(*arguments):
        if failures:
            raise OSError(failures.pop(), "stale")
        return original(*arguments)

    monkeypatch.setattr(module.os, "pread", pread)
    failures.append(number)
    assert list(storage.read(FILE, [(2, 3), (0, 1)])) == [b"234", b"0"]
    failures += [number, number]
    with pytest.raises(OSError, match="stale"):
        list(storage.read(FILE, [(2, 3)]))
    failures[:] = [errno.EACCES]
    with pytest.raises(PermissionError):
        list(storage.read(FILE, [(2, 3)]))


def test_a_closed_descriptor_is_opened_again(storage):
    assert list(storage.read(FILE, [(0, 2)])) == [b"01"]
    os.close(storage._open[FILE.name]._descriptor)
    (storage.root / FILE.name).replace(storage.root / "old")
    (storage.root / FILE.name).write_bytes(b"abcdefgh")
    assert list(storage.read(FILE, [(6, 2)])) == [b"gh"]


def test_a_file_that_was_replaced_by_a_longer_one_is_read(storage):
    path = storage.root / FILE.name
    path.write_bytes(b"01")
    with pytest.raises(ValueError, match="ends within the 3 bytes at 2"):
        list(storage.read(FILE, [(2, 3)]))
    path.rename(storage.root / "old")
    path.write_bytes(b"01234567")
    assert list(storage.read(FILE, [(2, 3)])) == [b"234"]
