"""A source that counts what it fetches, and the files that a cache must return."""

from __future__ import annotations

import random

from framestream.tools.fetch.base import FetchError


class Made:
    """A source whose files are generated from their names; ``fetched`` counts fetches."""

    origin = "made:"

    def __init__(self, sizes=None):
        self.sizes, self.fetched, self.version = sizes or {}, [], ""

    def find(self, path, tree=False):
        return self.sizes.get(path)

    def identity(self, path, tree=False):
        return self.version

    def fetch(self, path, scratch, tree=False):
        self.fetched.append(path)
        if path not in self.sizes:
            raise FetchError("missing_file", path, "not there")
        if not tree:
            (scratch / "media.mp4").write_bytes(contents(path, self.sizes[path]))
            return scratch / "media.mp4"
        (scratch / "frames").mkdir()
        for number in range(3):
            (scratch / "frames" / f"{number}.jpg").write_bytes(contents(f"{path}{number}", self.sizes[path] // 3))
        return scratch / "frames"


def contents(path, size):
    return random.Random(path).randbytes(size)


def read(source, cache, path, tree=False):
    with cache.scratch() as scratch:
        found = source.fetch(path, scratch, tree)
        assert found.is_relative_to(scratch)
        return {item.name: item.read_bytes() for item in found.iterdir()} if tree else found.read_bytes()


def wanted(path, size, tree=False):
    return {f"{i}.jpg": contents(f"{path}{i}", size // 3) for i in range(3)} if tree else contents(path, size)
