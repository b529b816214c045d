"""Hub repository on the loopback interface, with the responses of the real hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import MutableMapping
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.helpers.servers.web_server import Server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  #: bytes above which a file is in LFS, behind a redirect to /cdn/NAME/PATH


def blob(data: bytes) -> str:
    """Return the id of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def serve_hub(server: Server, files: MutableMapping[str, bytes], name: str = "me/data", page: int = 2) -> None:
    """Serve ``files`` as ``datasets/NAME``, with ``page`` of them in one response of a listing.

    Later changes of a file are served; files added later are not.
    """
    api, resolve, cdn_root = f"/api/datasets/{name}", f"/datasets/{name}/resolve/{COMMIT}", f"/cdn/{name}"

    def revision(request):
        request.answer(body=json.dumps({"id": name, "sha": COMMIT}).encode())

    def tree(request):
        url = urlsplit(request.path)
        folder = unquote(url.path.removeprefix(f"{api}/tree/{COMMIT}")).strip("/")
        prefix, entries = f"{folder}/" if folder else "", []
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            inner, deeper, _ = path.removeprefix(prefix).partition("/")
            if deeper:
                entry = {"type": "directory", "path": prefix + inner, "oid": "0" * 40, "size": 0}
            else:
                entry = {"type": "file", "path": path, "oid": blob(data), "size": len(data)}
                if len(data) > LARGE:
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            if entry not in entries:
                entries.append(entry)
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        next_page = f'<{server.url}{url.path}?cursor={start + page}>; rel="next"'
        more = {"Link": next_page} if start + page < len(entries) else {}
        request.answer(body=json.dumps(entries[start : start + page]).encode(), **more)

    def content(request):
        path = unquote(urlsplit(request.path).path).removeprefix(f"{resolve}/")
        if len(files[path]) > LARGE:
            return request.answer(302, Location=f"{server.url}{cdn_root}/{quote(path)}?signature=secret")
        request.serve(files[path])

    def cdn(request):
        request.serve(files[unquote(urlsplit(request.path).path).removeprefix(f"{cdn_root}/")])

    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
    server.routes |= {f"{api}/tree/{COMMIT}": tree}
    server.routes |= {f"{api}/tree/{COMMIT}/{quote(folder)}": tree for folder in folders}
    server.routes |= {f"{api}/revision/{name}": revision for name in ("main", "refs%2Fpr%2F1")}
    server.routes |= {f"{resolve}/{quote(path)}": content for path in files}
    server.routes |= {f"{cdn_root}/{quote(path)}": cdn for path in files}
