"""Hub repositories as a source: ``hf:OWNER/NAME[@REVISION]:FOLDER``.

A model repository is ``hf:models/OWNER/NAME``.

huggingface_hub supplies the URLs, the login (HF_TOKEN or a saved one) and HF_ENDPOINT. Files are downloaded by
``framestream.tools.fetch.http.client``: the downloads of huggingface_hub have no limits on size, time or stalls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from framestream.pipeline.utils.records import load_json
from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.object_listing import ListedFile, ListedSource

#: Groups: type of repository (datasets if it is missing), OWNER/NAME, revision, folder. The last two may be missing.
#: A revision has no colon, because a colon separates it from the folder.
HUB_LOCATION = re.compile(r"hf:(?:(datasets|models|spaces)/)?([\w.-]+/[\w.-]+)(?:@([^:\s]+))?(?::(.*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
#: Query of the next page in a Link header: ``<URL?QUERY>; rel="next"``.
NEXT_PAGE = re.compile(r"<[^>?]*\?([^>]*)>\s*;\s*rel=\"?next\"?")
MAX_PAGE = 64 << 20  #: bytes of one page of a listing
LOGIN_HINT = "accept its terms on the hub if it has any, and set HF_TOKEN to a token that may read it"


class HubStore:
    """A hub repository at one commit (see :class:`framestream.tools.fetch.object_listing.ObjectStore`).

    Args:
        repo_type: datasets, models or spaces.
        name: OWNER/NAME.
        revision: branch, tag or commit; ``main`` if empty.

    Raises:
        FetchError: the repository or revision does not exist or needs a login, or the hub is unreachable.
    """

    def __init__(self, repo_type: str, name: str, revision: str, limits: FetchLimits, endpoint: str = "") -> None:
        self._repo_type, self._name = repo_type, name
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.http = HttpClient(limits, build_hf_headers(library_name="framestream"), LOGIN_HINT)
        self.commit = revision if COMMIT.fullmatch(revision) else self._find_commit(revision)

    def files(self, folder: str) -> Iterator[tuple[str, ListedFile]]:
        """Yield each file directly in ``folder`` with its name."""
        root = f"{self._endpoint}/api/{self._repo_type}/{self._name}/tree/{self.commit}"
        url = first_url = f"{root}/{quote(folder)}" if folder else root
        location = f"hf:{self._name}:{folder}"
        while url:
            try:
                entries, headers = self._get_json(url, location)
            except FetchError as error:
                if error.reason == "missing_file":
                    return
                raise
            try:
                listed = [
                    (entry["path"].rpartition("/")[2], _listed_file(entry))
                    for entry in entries
                    if entry["type"] == "file"
                ]
            except (TypeError, ValueError, LookupError, AttributeError):
                raise FetchError("unreachable", location, "the response of the hub is not a list of files") from None
            yield from listed
            # Only the query of the link is used: the token must not go to another host that the link may name.
            page = NEXT_PAGE.search(headers.get("link", ""))
            url = f"{first_url}?{page[1]}" if page else ""

    def url(self, path: str) -> str:
        """Return the URL of a file."""
        repo_type = None if self._repo_type == "models" else self._repo_type.rstrip("s")
        return hf_hub_url(self._name, path, repo_type=repo_type, revision=self.commit, endpoint=self._endpoint)

    def _find_commit(self, revision: str) -> str:
        location = f"hf:{self._name}@{revision or 'main'}"
        url = f"{self._endpoint}/api/{self._repo_type}/{self._name}/revision/{quote(revision or 'main', safe='')}"
        try:
            answer, _ = self._get_json(url, location)
        except FetchError as error:
            if error.reason != "missing_file":
                raise
            message = f"no such {self._repo_type[:-1]} or revision, or it needs a login; {LOGIN_HINT}"
            raise FetchError("denied", location, message) from None
        commit = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise FetchError("unreachable", location, "the hub names no commit of the revision")
        return commit

    def _get_json(self, url: str, location: str) -> tuple[Any, Mapping[str, str]]:
        body, headers = self.http.get(url, location, MAX_PAGE)
        try:
            return load_json(body), headers
        except ValueError:
            raise FetchError("unreachable", location, "the response of the hub is not JSON") from None


def open_hub(location: str, limits: FetchLimits, endpoint: str = "") -> ListedSource:
    """Return the source of ``hf:OWNER/NAME[@REVISION]:FOLDER``.

    Its origin names the commit. Opening the origin gives the same files again.

    Raises:
        ValueError: the location does not have this form.
        FetchError: the repository cannot be read.
    """
    match = HUB_LOCATION.fullmatch(location)
    if not match:
        raise ValueError(f"{location} is not hf:OWNER/NAME[@REVISION]:FOLDER")
    if constants.HF_HUB_OFFLINE and not endpoint:
        raise FetchError("unreachable", location, "the hub is not used while HF_HUB_OFFLINE is set; unset it")
    repo_type, name, revision, folder = (text or "" for text in match.groups())
    validate_repo_id(name)
    store = HubStore(repo_type or "datasets", name, revision, limits, endpoint)
    prefix = f"{repo_type}/" if repo_type else ""
    return ListedSource(f"hf:{prefix}{name}@{store.commit}:{folder}", store, folder)


def _listed_file(entry: dict[str, Any]) -> ListedFile:
    """Return a file of the hub's listing. Large files have a SHA-256, small ones the id of a git blob."""
    large = entry.get("lfs")
    if large:
        return ListedFile(int(large["size"]), large["oid"], {"sha256": large["oid"]})
    return ListedFile(int(entry["size"]), entry["oid"], {"git": entry["oid"]})
