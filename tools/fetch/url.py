"""Web servers: ``url:https://HOST/FOLDER/{path}``, with the media path filled in where the template says."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from framestream.tools.fetch.base import FetchError, check_path, local_name
from framestream.tools.fetch.http.client import HttpClient, redacted
from framestream.tools.fetch.http.retry import FetchLimits

PLACEHOLDERS = ("path", "name", "stem", "folder")


class UrlTemplate:
    """An address with ``{path}`` (all of a media path), ``{name}`` (its last part), ``{stem}`` (that without its
    extension) or ``{folder}`` (all but the last part), which are quoted, so that no path changes the address's form.

    Raises:
        ValueError: not http(s), no or unknown placeholders, or a placeholder in the host.
    """

    def __init__(self, kind: str, text: str) -> None:
        named = re.findall(r"\{([^{}]*)\}", text)
        parts = urlsplit(text)
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        self.shown = f"{kind}:{redacted(text)}"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.shown}: not an address that begins with http:// or https://")
        if not named or not set(named) <= set(PLACEHOLDERS) or re.search(r"[{}]", re.sub(r"\{\w+\}", "", text)):
            raise ValueError(f"{self.shown}: name the file by {known} and by nothing else in braces")
        if "{" in parts.netloc:
            raise ValueError(f"{self.shown}: the host cannot depend on the file")
        self._text = text

    def address(self, path: str) -> str:
        """The address of the file ``path``."""
        return self._fill(self._text, path)

    def place(self, path: str) -> str:
        """The same for error lines: without credentials."""
        return self._fill(self.shown, path)

    def _fill(self, text: str, path: str) -> str:
        parts = PurePosixPath(path)
        folder = "" if parts.parent == PurePosixPath(".") else str(parts.parent)
        values = {"path": path, "name": parts.name, "stem": parts.stem, "folder": folder}
        quoted = {name: quote(value, safe="/", errors="replace") for name, value in values.items()}
        return re.sub(r"\{(\w+)\}", lambda found: quoted[found[1]], text)


class UrlSource:
    """The files of a web server, which cannot list them (see ``framestream.tools.fetch.base.Source``)."""

    def __init__(self, template: str, limits: FetchLimits) -> None:
        self._template, self._http = UrlTemplate("url", template), HttpClient(limits)
        self.origin = self._template.shown

    def find(self, path: str, tree: bool = False) -> int | None:
        """Bytes of a file, by one request."""
        place = self._place(path, tree)
        facts = self._http.probe(self._template.address(path), place)
        return None if facts is None else facts.size

    def identity(self, path: str, tree: bool = False) -> str:
        """ETag or date, and size."""
        facts = self._http.probe(self._template.address(path), self._place(path, tree))
        return "" if facts is None else facts.identity

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Download a file into ``scratch``."""
        place, target = self._place(path, tree), scratch / local_name(path)
        self._http.download(self._template.address(path), target, place)
        return target

    def _place(self, path: str, tree: bool) -> str:
        check_path(self.origin, path)
        if tree:
            fix = "map the root to a folder, the hub, a bucket or archives"
            raise FetchError("unsupported", f"{self.origin} {path}", f"a web server lists no folders of frames; {fix}")
        return self._template.place(path)
