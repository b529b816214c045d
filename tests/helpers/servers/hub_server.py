"""Hub server for tests: the part of the API that fetching files needs, served from memory by a thread."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """Files by path, of one commit, which ``main`` and ``v1`` point to."""

    files: dict[str, bytes]
    token: str = ""  #: if set, the repository is gated: only requests with this token are answered

    @property
    def commit(self) -> str:
        files = sorted((path, etag(body)) for path, body in self.files.items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def has(self, revision: str) -> bool:
        return revision in ("main", "v1", self.commit)


@dataclass
class Hub:
    """Repositories by name, the URL for ``HF_ENDPOINT``, and the requests made."""

    repositories: dict[str, Repository]
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve a hub with these repositories until the end of the block."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            name = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+)/(?:revision|tree|resolve)/([^/]+)(?:/(.*))?", path)
            repository = hub.repositories.get(name[1]) if name else None
            if repository is None:
                return self.refuse(401, "RepoNotFound")  # the answer of the hub to requests without a token
            if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
                return self.refuse(403, "GatedRepo")
            if not repository.has(name[2]):
                return self.refuse(404, "RevisionNotFound")
            if "/resolve/" in path:
                if name[3] not in repository.files:
                    return self.refuse(404, "EntryNotFound", repository.commit)
                return self.answer(repository.files[name[3]], repository.commit)
            if "/tree/" in path:
                files = repository.files.items()
                return self.answer([{"type": "file", "path": p, "size": len(b), "oid": etag(b)} for p, b in files])
            siblings = [{"rfilename": file} for file in repository.files]
            return self.answer({"id": name[1], "sha": repository.commit, "siblings": siblings})

        def answer(self, value: object, commit: str = "") -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(200)
            self.send_header("ETag", f'"{etag(body)}"')
            self.send(body, commit)

        def refuse(self, status: int, code: str, commit: str = "") -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send(b"", commit)

        def send(self, body: bytes, commit: str) -> None:
            if commit:
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@functools.cache  # weights of many megabytes are asked for several times
def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
