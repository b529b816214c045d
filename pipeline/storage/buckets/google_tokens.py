"""Tokens of Google logins that cannot sign: of persons, of other clouds, of machines. google-auth renews them."""

from __future__ import annotations

import json
import logging
import os
import threading
from datetime import timezone
from pathlib import Path
from typing import Any

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
DEFAULT_FILE = "~/.config/gcloud/application_default_credentials.json"


class GoogleTokens:
    """The token of a login, renewed before it expires. Threads may share it."""

    def __init__(self, credentials: Any, hint: str) -> None:
        from google.auth.transport.requests import Request

        self._credentials, self._hint, self._request = credentials, hint, Request()
        self._lock = threading.Lock()

    def headers(self) -> dict[str, str]:
        """Return the header that carries the token, which is valid for three minutes at least.

        Raises:
            PermissionError: the token cannot be renewed.
        """
        return {"Authorization": f"Bearer {self.credential()['token']}"}

    def credential(self) -> dict[str, Any]:
        """Return the token for obstore."""
        from google.auth.exceptions import GoogleAuthError

        with self._lock:
            try:
                if not self._credentials.valid:
                    self._credentials.refresh(self._request)
            except GoogleAuthError as error:
                raise PermissionError(f"the login cannot be renewed ({_first_line(error)}); {self._hint}") from None
            expiry = self._credentials.expiry
            return {
                "token": self._credentials.token,
                "expires_at": expiry and expiry.replace(tzinfo=timezone.utc),
            }


def google_login_kind(hint: str) -> str:
    """Return the type that the file of the application default states; empty if there is no such file.

    Raises:
        PermissionError: the file cannot be read.
    """
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    path = Path(named or DEFAULT_FILE).expanduser()
    if not named and not path.exists():
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["type"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no login"
        raise PermissionError(f"{path}: cannot be read ({reason}); {hint}") from None


def google_tokens(kind: str, hint: str) -> GoogleTokens | None:
    """Return the tokens of the application default; None if there is no login, or only google-auth could ask for it.

    Args:
        kind: what :func:`google_login_kind` returned.

    Raises:
        PermissionError: there is a login that google-auth reads, which is missing, or it is damaged.
    """
    try:
        import google.auth
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
        from google.auth.transport import requests  # noqa: F401
    except ImportError:
        if not kind:
            return None
        fix = "pip install -e '.[gs]', or set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account"
        raise PermissionError(f"a Google login of the type {kind} requires google-auth: {fix}") from None
    logging.getLogger("google.auth._default").setLevel(logging.ERROR)  # it warns of a project, which nothing here needs
    try:
        return GoogleTokens(google.auth.default(scopes=[SCOPE])[0], hint)
    except DefaultCredentialsError as error:
        if not kind:
            return None
        raise PermissionError(f"{_first_line(error)}; {hint}") from None
    except GoogleAuthError as error:
        raise PermissionError(f"{_first_line(error)}; {hint}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200] or type(error).__name__
