"""Folders of a build's work folder that are read back later: a record in each has the digests of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import RecordError, read_record, write_record
from framestream.tools.common.errors import BuildError

SEAL = "record.json"  #: name of the record
_FILES = "files"  # its field with size and digest of each file


class DamagedFolderError(BuildError):
    """A sealed folder is damaged; one line with the file and the reason."""


def seal_folder(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the record of ``folder``: ``fields``, and size and digest of each file in it and in its folders."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: [(folder / name).stat().st_size, file_digest(folder / name)] for name in names if name != SEAL}
    write_record(folder / SEAL, {**fields, _FILES: files})


def read_seal(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's record.

    Raises:
        DamagedFolderError: the record is missing or damaged.
    """
    try:
        return read_record(folder / SEAL, "record", "it is made again", has_digest=True)
    except RecordError as error:
        raise DamagedFolderError(str(error).rpartition(";")[0]) from None
    except OSError as error:
        raise DamagedFolderError(f"{folder / SEAL}: cannot be read ({error.strerror})") from None


def check_folder(
    folder: Path, moved: Callable[[str, int, str], bool] | None = None, large: str | None = None
) -> dict[str, Any]:
    """Compare the files of a sealed folder with its record, and return the fields of the record.

    Args:
        moved: called with name, size and digest of a file that is missing; returns whether it is somewhere else.
        large: name of a file of which only the size is compared.

    Raises:
        DamagedFolderError: a file is missing or damaged.
    """
    fields = read_seal(folder)
    for name, (size, digest) in fields[_FILES].items():
        path = folder / name
        try:
            if path.stat().st_size != size or (name != large and file_digest(path) != digest):
                raise DamagedFolderError(f"{path}: damaged (its size or digest is not the recorded one)")
        except FileNotFoundError:
            if not moved or not moved(name, size, digest):
                raise DamagedFolderError(f"{path}: missing") from None
        except OSError as error:
            raise DamagedFolderError(f"{path}: cannot be read ({error.strerror})") from None
    return fields
