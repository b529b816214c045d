"""Expand ``~`` and variables in paths that people write: in manifests, in root maps and on command lines."""

from __future__ import annotations

import os
import re

MAX_LENGTH = 4096  #: characters of a path
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|hf:")
_ONE_SLASH = re.compile(r"(https?|s3|gs|az|ftp|file):/(?=[^/])", re.I)
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


class PathError(ValueError):
    """A path cannot be used as it is written; one line with the path and the fix."""


def is_address(text: str) -> bool:
    """Return whether ``text`` is an address such as ``https://HOST/PATH`` or ``hf:OWNER/NAME``, not a local path."""
    return _ADDRESS.match(text) is not None


def missing_slash(text: str) -> str:
    """Return the address that ``text`` means if one of its two slashes was lost, as in ``https:/HOST``; else nothing.

    Joining or normalizing an address as if it were a path loses it.
    """
    return _ONE_SLASH.sub(r"\1://", text, count=1) if _ONE_SLASH.match(text) else ""


def expand_path(text: str) -> str:
    """Replace ``~`` and ``~USER`` at the beginning, and ``$NAME`` and ``${NAME}`` anywhere. Addresses stay unchanged.

    Raises:
        PathError: a variable is not set, there is no such user, no file can have such a path, or it is an address with
            one slash.
    """
    if is_address(text):
        return text
    if address := missing_slash(text):
        raise PathError(f"{text:.200}: a slash is missing after the colon; write {address:.200}")
    if len(text) > MAX_LENGTH or _CONTROL.search(text):
        raise PathError(f"{text!r:.60} has a control character or over {MAX_LENGTH:,} characters; correct the path")

    def value_of(match: re.Match[str]) -> str:
        name = match[2] or match[1]
        value = os.environ.get(name, "") if re.fullmatch(r"\w+", name) else ""
        if not value:
            raise PathError(f"{text}: the variable {name} is not set; set it, or write the path in full")
        return value

    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded.startswith("~"):
        user = text.partition("/")[0]
        fix = f"write ./{text} for a file of that name" if user != "~" else "set HOME, or write the path in full"
        raise PathError(f"{text}: there is no home folder {user}; {fix}")
    return _VARIABLE.sub(value_of, expanded)
