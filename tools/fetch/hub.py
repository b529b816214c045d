"""Hub repositories: ``hf:OWNER/NAME[@REVISION]:FOLDER``; a model repository is ``hf:models/OWNER/NAME``.

huggingface_hub gives the addresses, the login (HF_TOKEN or a saved one) and HF_ENDPOINT. Files come through
``framestream.tools.fetch.http.client``, because huggingface_hub's own downloads know no limits on size, time or stalls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.object_listing import ListedFile, ListedSource

PLACE = re.compile(r"hf:(?:(datasets|models|spaces)/)?([\w.-]+/[\w.-]+)(?:@([^:\s]+))?(?::(.*))?", re.ASCII)
ANSWER = 64 << 20  #: most bytes of one page of a listing
LOGIN = "accept its terms on the hub and set HF_TOKEN"


class HubStore:
    """A hub repository at one commit (see ``framestream.tools.fetch.object_listing.Store``).

    Raises:
        FetchError: no such repository or revision, no login, hub out of reach.
    """

    def __init__(self, kind: str, name: str, revision: str, limits: FetchLimits, endpoint: str = "") -> None:
        self._kind, self._name = kind, name
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.http = HttpClient(limits, build_hf_headers(library_name="framestream"), LOGIN)
        self.commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else self._commit(revision)

    def files(self, folder: str) -> Iterator[tuple[str, ListedFile]]:
        """Name and item of each file directly in ``folder``."""
        api = f"{self._endpoint}/api/{self._kind}/{self._name}/tree/{self.commit}"
        url = first = f"{api}/{quote(folder)}" if folder else api
        place = f"hf:{self._name}:{folder}"
        while url:
            try:
                entries, headers = self._json(url, place)
            except FetchError as error:
                if error.reason == "missing_file":
                    return
                raise
            for entry in entries:
                if entry.get("type") == "file":
                    yield entry["path"].rpartition("/")[2], _item(entry)
            page = re.search(r"<[^>?]*\?([^>]*)>\s*;\s*rel=\"?next\"?", headers.get("link", ""))
            url = f"{first}?{page[1]}" if page else ""  # of this endpoint, whatever host the link names

    def url(self, path: str) -> str:
        """Address of a file."""
        kind = None if self._kind == "models" else self._kind.rstrip("s")
        return hf_hub_url(self._name, path, repo_type=kind, revision=self.commit, endpoint=self._endpoint)

    def _commit(self, revision: str) -> str:
        place = f"hf:{self._name}@{revision or 'main'}"
        url = f"{self._endpoint}/api/{self._kind}/{self._name}/revision/{quote(revision or 'main', safe='')}"
        try:
            answer, _ = self._json(url, place)
        except FetchError as error:
            if error.reason != "missing_file":
                raise
            message = f"no such {self._kind[:-1]} or revision, or one that needs a login; {LOGIN}"
            raise FetchError("denied", place, message) from None
        commit = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise FetchError("unreachable", place, "the hub names no commit of the revision")
        return commit

    def _json(self, url: str, place: str) -> tuple[Any, Any]:
        body, headers = self.http.get(url, place, ANSWER)
        try:
            return json.loads(body), headers
        except ValueError:
            raise FetchError("unreachable", place, "the hub answered with something that is not JSON") from None


def open_hub(place: str, limits: FetchLimits, endpoint: str = "") -> ListedSource:
    """The source of ``hf:OWNER/NAME[@REVISION]:FOLDER``; its origin names the commit, and opens the same files again.

    Raises:
        ValueError: the place is not of this form.
        FetchError: the repository cannot be asked.
    """
    found = PLACE.fullmatch(place)
    if not found:
        raise ValueError(f"{place} is not hf:OWNER/NAME[@REVISION]:FOLDER")
    if constants.HF_HUB_OFFLINE and not endpoint:
        raise FetchError("unreachable", place, "the hub is not asked while HF_HUB_OFFLINE is set")
    kind, name, revision, folder = (text or "" for text in found.groups())
    repository = HubStore(kind or "datasets", name, revision, limits, endpoint)
    prefix = f"{kind}/" if kind else ""
    return ListedSource(f"hf:{prefix}{name}@{repository.commit}:{folder}", repository, folder)


def _item(entry: dict[str, Any]) -> ListedFile:
    """A file of the hub's listing: large files have a sha256, small ones the name of a git blob."""
    large = entry.get("lfs")
    if large:
        return ListedFile(int(large["size"]), large["oid"], {"sha256": large["oid"]})
    return ListedFile(int(entry["size"]), entry["oid"], {"git": entry["oid"]})
