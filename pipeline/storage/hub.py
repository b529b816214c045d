"""The Hugging Face hub: ``hf://datasets/OWNER/NAME[@REVISION]/PATH`` and ``hf://buckets/OWNER/NAME/PATH``.

huggingface_hub provides the addresses, the login (HF_TOKEN or a saved one) and HF_ENDPOINT. Files are read by ranged
requests.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from framestream.pipeline.storage.base import ReadOptions
from framestream.pipeline.storage.http import Address

LOGIN = "accept its terms on the hub if it has any, and set HF_TOKEN to a token that may read it"
NETWORK = "check the network and HF_ENDPOINT"
BUCKET_LOGIN = "check the name of the bucket, and set HF_TOKEN to a token that may read it if it is private"


class HubAddresses:
    """``hf://datasets/OWNER/NAME[@REVISION]/PATH`` at the commit that the revision has when it is opened.

    Login and endpoint are those of huggingface_hub.
    """

    def __init__(self, root: str, options: ReadOptions) -> None:
        found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/\s]+))?(?:/(.*?))?/*", root, re.ASCII)
        if not found:
            raise ValueError(f"{root}: not hf://datasets/OWNER/NAME[@REVISION]/PATH (%2F for a / in the revision)")
        self.display_url, self._repository, self._folder = root.rstrip("/"), found[1], found[3] or ""
        self._headers = build_hf_headers(library_name="framestream")
        self._commit = self._commit_of(unquote(found[2] or "main"), options.timeout)

    def address(self, name: str) -> Address:
        path = f"{self._folder}/{name}" if self._folder else name
        url = hf_hub_url(self._repository, path, repo_type="dataset", revision=self._commit)
        return Address(url, f"{self.display_url}/{name}", self._headers, LOGIN, NETWORK)

    def _commit_of(self, revision: str, timeout: float) -> str:
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            return revision
        try:
            commit = HfApi().dataset_info(self._repository, revision=revision, timeout=timeout).sha
        except RevisionNotFoundError:
            raise FileNotFoundError(f"{self.display_url}: the dataset has no revision {revision}") from None
        except GatedRepoError:
            raise PermissionError(f"{self.display_url}: is gated; {LOGIN}") from None
        except (RepositoryNotFoundError, HfHubHTTPError) as error:
            raise self._refusal(error) from None
        except OfflineModeIsEnabled:
            raise ConnectionError(f"{self.display_url}: HF_HUB_OFFLINE is set; unset it to read the hub") from None
        except Exception as error:  # huggingface_hub's errors depend on its HTTP client, which has changed
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConnectionError(f"{self.display_url}: the hub cannot be reached ({reason}); {NETWORK}") from None
        if commit is None:
            raise ConnectionError(f"{self.display_url}: the hub does not state the commit of revision {revision}")
        return commit

    def _refusal(self, error: HfHubHTTPError) -> OSError:
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return FileNotFoundError(f"{self.display_url}: no such dataset, or it is private; {LOGIN}")
        if status in (401, 403):
            return PermissionError(f"{self.display_url}: the hub refuses to read it ({status}); {LOGIN}")
        return ConnectionError(f"{self.display_url}: the hub answers {status}; try again later")


class HubBucketAddresses:
    """``hf://buckets/OWNER/NAME/PATH``. A bucket has no revisions: the files are those of the moment."""

    def __init__(self, root: str) -> None:
        found = re.fullmatch(r"hf://buckets/([\w.-]+/[\w.-]+)(?:/(.*?))?/*", root, re.ASCII)
        if not found:
            raise ValueError(f"{root}: not hf://buckets/OWNER/NAME/PATH")
        self.display_url, self._bucket, self._folder = root.rstrip("/"), found[1], found[2] or ""
        self._headers = build_hf_headers(library_name="framestream")

    def address(self, name: str) -> Address:
        path = f"{self._folder}/{name}".lstrip("/")
        url = f"{constants.ENDPOINT}/buckets/{self._bucket}/resolve/{quote(path, safe='')}"
        return Address(url, f"{self.display_url}/{name}", self._headers, BUCKET_LOGIN, NETWORK)
