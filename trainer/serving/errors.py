"""Errors of requests, in the form of the OpenAI API."""

from __future__ import annotations

from typing import Any

from framestream.pipeline.media.errors import MediaError

#: status -> ``type`` of the error; others are ``invalid_request_error``, or ``server_error`` from 500
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
#: reasons of media that are of another kind than the request says, or of one that is not read
OTHER_KINDS = ("not_media", "no_video_stream", "unsupported")


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: of the HTTP response.
        message: one line with the fix.
        code: a short name of the reason, for programs.
        param: the field of the request.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, " ".join(message.split()), code, param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused_media(error: MediaError, path: object, param: str) -> RequestError:
    """Turn the error of a file at ``path`` into that of the request's field ``param``, without the path.

    The status is 415 for a file of another kind, and 422 for a damaged one.
    """
    status = 415 if error.reason in OTHER_KINDS else 422
    return RequestError(status, f"{param}: {str(error).removeprefix(f'{path}: ')}", error.reason, param)
