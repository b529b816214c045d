"""Files that are complete or absent, also on file systems without some calls and on full disks."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from framestream.pipeline.utils.atomic_io import atomic_file, fsync_path, write_atomic


def fail_fsync(monkeypatch, number, of_folders):
    """Make fsync fail for folders, or for files."""
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) == of_folders:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM])
@pytest.mark.parametrize("of_folders", [True, False])
def test_a_file_system_without_fsync_is_used(tmp_path, monkeypatch, number, of_folders):
    fail_fsync(monkeypatch, number, of_folders)
    write_atomic(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(("of_folders", "name"), [(True, ""), (False, "a.tmp")])
def test_a_broken_disk_is_an_error_with_its_name(tmp_path, monkeypatch, number, of_folders, name):
    fail_fsync(monkeypatch, number, of_folders)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_atomic(tmp_path / "a", b"content")
    assert caught.value.filename == str(tmp_path / name)
    assert os.listdir(tmp_path) == (["a"] if of_folders else [])


def test_errors_of_writing_name_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as file.write raises it
    assert caught.value.filename == str(tmp_path / "a.tmp")


def test_a_folder_that_cannot_be_read_is_not_flushed(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "open", refuse)
    fsync_path(tmp_path)
    with pytest.raises(PermissionError):
        fsync_path(tmp_path / "a")
