"""What a campaign damages and reads: targets, and the result of reading one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Reading:
    """What reading the files of a target gave.

    Attributes:
        items: name of each item that was read -> digest of its content.
        left_out: name of each item that was left out and recorded -> the recorded message.
        messages: further lines for the user.
    """

    items: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    messages: tuple[str, ...] = ()


class CommandError(Exception):
    """A command ended with an error. Its message is what the command printed."""


@dataclass(frozen=True)
class Target:
    """A group of files with one reader.

    Attributes:
        name: for the command line and the summary.
        prepare: writes the files into the current folder, given the folder of the corpus. It runs once.
        files: patterns of the files that are damaged, relative to that folder.
        read: reads the files in the current folder as a user's command does; gets the name of the damaged file.
        is_truth: whether the files are the user's own words, so that a changed value is a valid other value.
        own_items: whether each item has the name of its file, so that damage may change no other item.
        may_lack: whether the files are optional, so that another result without one of them is right.
        share: relative number of mutants.
    """

    name: str
    prepare: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[str], Reading]
    is_truth: bool = False
    own_items: bool = False
    may_lack: bool = False
    share: float = 1.0

    def list_files(self, folder: Path) -> list[str]:
        """List the files to damage below ``folder``, sorted."""
        found = {path for pattern in self.files for path in folder.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(folder).as_posix() for path in found)


def digest_of(*parts: bytes | str) -> str:
    """Return a digest of the contents of an item."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]
