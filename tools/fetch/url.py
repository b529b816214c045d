"""Web servers as a source: ``url:https://HOST/FOLDER/{path}``, a template that the media path is filled into."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from framestream.pipeline.utils.paths import missing_slash
from framestream.tools.fetch.base import FetchError, check_path, local_name
from framestream.tools.fetch.http.client import HttpClient, redact_url
from framestream.tools.fetch.http.retry import FetchLimits

PLACEHOLDERS = ("path", "name", "stem", "folder")


class UrlTemplate:
    """A URL with placeholders for a media path.

    ``{path}`` is the whole media path, ``{name}`` its last part, ``{stem}`` the last part without its extension, and
    ``{folder}`` all but the last part. Values are percent-encoded, so a path cannot change the structure of the URL.

    Args:
        scheme: ``url`` or ``page``, for messages.
        template: the URL.

    Raises:
        ValueError: not http(s), no or unknown placeholders, or a placeholder in the host.
    """

    def __init__(self, scheme: str, template: str) -> None:
        if address := missing_slash(template):
            raise ValueError(f"a slash is missing after the second colon; write {scheme}:{redact_url(address)}")
        names = re.findall(r"\{([^{}]*)\}", template)
        parts = urlsplit(template)
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        self.redacted = f"{scheme}:{redact_url(template)}"  #: the template without credentials
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.redacted}: the URL must begin with http:// or https://")
        # The second test finds braces that do not form a placeholder.
        if not names or not set(names) <= set(PLACEHOLDERS) or re.search(r"[{}]", re.sub(r"\{\w+\}", "", template)):
            raise ValueError(f"{self.redacted}: name the file by {known}; other braces are not allowed")
        if "{" in parts.netloc:
            raise ValueError(f"{self.redacted}: the host cannot depend on the file")
        self._template = template

    def url(self, path: str) -> str:
        """Return the URL of the file ``path``."""
        return self._fill(self._template, path)

    def redacted_url(self, path: str) -> str:
        """Return the URL of the file ``path`` without credentials, for error messages."""
        return self._fill(self.redacted, path)

    def _fill(self, template: str, path: str) -> str:
        parts = PurePosixPath(path)
        folder = "" if parts.parent == PurePosixPath(".") else str(parts.parent)
        values = {"path": path, "name": parts.name, "stem": parts.stem, "folder": folder}
        quoted = {name: quote(value, safe="/", errors="replace") for name, value in values.items()}
        return re.sub(r"\{(\w+)\}", lambda match: quoted[match[1]], template)


class UrlSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` for a web server, which cannot list its files."""

    def __init__(self, template: str, limits: FetchLimits) -> None:
        self._template, self._http = UrlTemplate("url", template), HttpClient(limits)
        self.origin = self._template.redacted

    def find(self, path: str, tree: bool = False) -> int | None:
        """Return the bytes of a file. Costs one request."""
        location = self._location(path, tree)
        info = self._http.probe(self._template.url(path), location)
        return None if info is None else info.size

    def identity(self, path: str, tree: bool = False) -> str:
        """Return the ETag or date, and the size."""
        info = self._http.probe(self._template.url(path), self._location(path, tree))
        return "" if info is None else info.identity

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """Download a file into ``scratch``."""
        location, target = self._location(path, tree), scratch / local_name(path)
        self._http.download(self._template.url(path), target, location)
        return target

    def _location(self, path: str, tree: bool) -> str:
        """Check ``path`` and return its URL for error messages."""
        check_path(self.origin, path)
        if tree:
            message = "a web server lists no folders of frames; map the root to a folder, the hub, a bucket or archives"
            raise FetchError("unsupported", f"{self.origin} {path}", message)
        return self._template.redacted_url(path)
