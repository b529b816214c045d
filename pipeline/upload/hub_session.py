"""What uploads to the hub share: time limits, and errors in one line without signatures."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session, set_client_factory

from framestream.pipeline.upload.files import RefusedError, UploadError

STALL_SECONDS = 300.0  #: without an answer, or without a byte that is taken
HUB_LOGIN = "set HF_TOKEN to a token with write access, or log in with `hf auth login`"
GROUP_BYTES = 1 << 30  #: of files that are sent at a time, between two steps of the progress bar


def limit_hub_requests() -> None:
    """Limit how long requests of huggingface_hub may stand still, in this process."""
    from huggingface_hub.utils._http import default_client_factory

    def make_client():
        client = default_client_factory()
        client.timeout = STALL_SECONDS
        return client

    set_client_factory(make_client)
    get_session()
    disable_progress_bars()


@contextlib.contextmanager
def hub_errors(display_url: str) -> Iterator[None]:
    """Raise errors of huggingface_hub as :class:`UploadError` or :class:`RefusedError`, in one line."""
    try:
        yield
    except (UploadError, RefusedError):
        raise
    except Exception as error:  # huggingface_hub's errors depend on its HTTP client, and hf_xet has none of its own
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | HfHubHTTPError | EntryNotFoundError):
            raise  # of the local files
        raise _explain(display_url, error) from None


def _explain(display_url: str, error: Exception) -> Exception:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    if isinstance(error, RevisionNotFoundError):
        return RefusedError(f"{display_url}: there is no such branch; create it, or leave out the revision")
    if isinstance(error, GatedRepoError | RepositoryNotFoundError) or status in (401, 403):
        return RefusedError(f"{display_url}: the hub refuses ({_one_line(error)}); {HUB_LOGIN}")
    if status == 412:
        return UploadError(f"{display_url}: somebody else has changed it meanwhile; run the command again")
    if isinstance(error, OfflineModeIsEnabled):
        return RefusedError(f"{display_url}: HF_HUB_OFFLINE is set; unset it to upload")
    fix = "" if status else "check the network and HF_ENDPOINT, and "
    return UploadError(f"{display_url}: the upload failed ({_one_line(error)}); {fix}run the command again to continue")


def _one_line(error: Exception) -> str:
    """Return an error's message in one line, without queries of addresses, which may hold signatures."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", re.sub(r"//[^/\s@]*@", "//", text))[:300]
