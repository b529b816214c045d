"""Hub on the loopback interface that takes uploads: repositories by git LFS, buckets by hf_xet's storage in a folder.

It answers as the real hub does, as far as huggingface_hub, ``datasets`` and this project ask.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flask
from huggingface_hub import constants
from werkzeug.serving import make_server

from tests.helpers.servers.fetch_hub import blob

REGULAR_BYTES = 1000  #: above which a file is in LFS, unless it is a text
TOKEN = "hf_secret"


@dataclass
class PushedRepository:
    """Files by path, after each commit."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.tar filter=lfs\n"}])
    large: set[str] = field(default_factory=set)  # paths in LFS
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})  # to the number of a commit

    def sha(self, number: int) -> str:
        files = sorted((path, blob(data)) for path, data in self.commits[number].items())
        return hashlib.sha1(repr((number, files)).encode()).hexdigest()

    def find(self, revision: str) -> int | None:
        by_sha = {self.sha(number): number for number in range(len(self.commits))}
        return self.branches.get(revision, by_sha.get(revision))

    @property
    def files(self) -> dict[str, bytes]:
        """Files of ``main``."""
        return self.commits[self.branches["main"]]


@dataclass
class UploadHub:
    """``repositories`` by ``datasets/OWNER/NAME`` or ``models/OWNER/NAME``, ``buckets`` by ``OWNER/NAME``."""

    xet: Path
    url: str = ""
    repositories: dict[str, PushedRepository] = field(default_factory=dict)
    buckets: dict[str, dict[str, tuple[bytes, str]]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    xet_hashes: dict[str, str] = field(default_factory=dict)  # by SHA-256, of files that repositories may get by Xet
    asked: list[str] = field(default_factory=list)
    fail: Callable[[str], int | None] = lambda request: None  #: status of a failure of this request, or none

    def point_at(self, monkeypatch: Any) -> None:
        """Do what HF_ENDPOINT and HF_TOKEN do when huggingface_hub is imported; uploads go by LFS."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def sent(self, method: str = "PUT") -> list[str]:
        """Paths of the requests with this method."""
        return [line.partition(" ")[2] for line in self.asked if line.startswith(f"{method} ")]


@contextlib.contextmanager
def upload_hub(xet: Path) -> Iterator[UploadHub]:
    """Serve an empty hub until the end of the block. Files of buckets are kept in the folder ``xet``."""
    hub = UploadHub(xet)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, _application(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # seconds until it sees its end
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _refuse(status: int, code: str = "") -> flask.Response:
    return flask.Response("", status, {"X-Error-Code": code} if code else {})


def _application(hub: UploadHub) -> flask.Flask:
    app = flask.Flask("hub")

    @app.before_request
    def log():
        request = flask.request
        line = f"{request.method} {request.full_path.rstrip('?')}"
        hub.asked.append(line)
        if status := hub.fail(line):
            return _refuse(status)
        is_signed = request.path.startswith(("/lfs/", "/cdn/")) or request.method in ("GET", "HEAD")
        if not is_signed and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _refuse(401)
        return None

    @app.post("/api/repos/create")
    def create():
        wanted = flask.request.json
        name = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
        known = name in hub.repositories
        hub.repositories.setdefault(name, PushedRepository())
        return {"url": f"{hub.url}/{name.removeprefix('models/')}", "id": "1"}, 409 if known else 200

    def repository(kind: str, owner: str, name: str) -> PushedRepository:
        found = hub.repositories.get(f"{kind}/{owner}/{name}")
        if found is None:
            flask.abort(_refuse(404, "RepoNotFound"))
        return found

    def commit_of(found: PushedRepository, revision: str) -> int:
        number = found.find(revision)
        if number is None:
            flask.abort(_refuse(404, "RevisionNotFound"))
        return number

    @app.get("/api/<any(datasets, models):kind>/<owner>/<name>")
    @app.get("/api/<any(datasets, models):kind>/<owner>/<name>/revision/<revision>")
    def info(kind, owner, name, revision="main"):
        found = repository(kind, owner, name)
        number = commit_of(found, revision)
        siblings = [{"rfilename": path} for path in found.commits[number]]
        return {"id": f"{owner}/{name}", "sha": found.sha(number), "siblings": siblings, "private": False, "tags": []}

    def entry(found: PushedRepository, files: dict[str, bytes], path: str) -> dict:
        if path not in files:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        data = files[path]
        value = {"type": "file", "path": path, "oid": blob(data), "size": len(data)}
        if path in found.large:
            value["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return value

    @app.get("/api/<any(datasets, models):kind>/<owner>/<name>/tree/<revision>")
    @app.get("/api/<any(datasets, models):kind>/<owner>/<name>/tree/<revision>/<path:folder>")
    def tree(kind, owner, name, revision, folder=""):
        found = repository(kind, owner, name)
        files = found.commits[commit_of(found, revision)]
        folder = f"{folder}/" if folder else ""
        everything = dict.fromkeys(
            part for path in files for part in (*_parents(path), path) if part.startswith(folder) and part != folder
        )
        recursive = flask.request.args.get("recursive", "").lower() == "true"
        return [entry(found, files, path) for path in everything if recursive or "/" not in path[len(folder) :]]

    @app.post("/api/<any(datasets, models):kind>/<owner>/<name>/paths-info/<revision>")
    def paths_info(kind, owner, name, revision):
        found = repository(kind, owner, name)
        files = found.commits[commit_of(found, revision)]
        known = {part for path in files for part in (*_parents(path), path)}
        wanted = flask.request.form.getlist("paths") or (flask.request.get_json(silent=True) or {}).get("paths", [])
        return [entry(found, files, path.strip("/")) for path in wanted if path.strip("/") in known]

    @app.post("/api/<any(datasets, models):kind>/<owner>/<name>/branch/<branch>")
    def create_branch(kind, owner, name, branch):
        found = repository(kind, owner, name)
        if branch in found.branches:
            return _refuse(409)
        found.branches[branch] = found.branches["main"]
        return {}

    def is_large(file: dict) -> bool:
        return file["size"] > REGULAR_BYTES and not file["path"].endswith((".json", ".md", ".yaml"))

    @app.post("/api/validate-yaml")
    def validate():
        return {"errors": [], "warnings": []}

    @app.post("/api/<any(datasets, models):kind>/<owner>/<name>/preupload/<revision>")
    def preupload(kind, owner, name, revision):
        repository(kind, owner, name)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file) else "regular",
                    "shouldIgnore": False,
                }
                for file in flask.request.json["files"]
            ]
        }

    @app.post("/datasets/<owner>/<name>.git/info/lfs/objects/batch")
    @app.post("/<owner>/<name>.git/info/lfs/objects/batch")
    def batch(owner, name):
        objects = []
        for wanted in flask.request.json["objects"]:
            value = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.lfs:
                value["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}?X-Signature=very-secret"}}
            objects.append(value)
        return {"transfer": "basic", "objects": objects}

    @app.put("/lfs/<oid>")
    def put(oid):
        data = flask.request.get_data()
        if hashlib.sha256(data).hexdigest() != oid:
            return _refuse(400)
        hub.lfs[oid] = data
        return ""

    @app.post("/api/<any(datasets, models):kind>/<owner>/<name>/commit/<revision>")
    def commit(kind, owner, name, revision):
        found = repository(kind, owner, name)
        head = found.branches.get(revision)
        if head is None:
            return _refuse(404, "RevisionNotFound")
        files = dict(found.commits[head])
        for line in flask.request.get_data().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header" and value.get("parentCommit", found.sha(head)) != found.sha(head):
                return _refuse(412)
            if step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                found.large.discard(value["path"])
            if step["key"] == "lfsFile":
                if value["oid"] not in hub.lfs and value["oid"] in hub.xet_hashes:
                    hub.lfs[value["oid"]] = _read_xet(hub.xet, hub.xet_hashes[value["oid"]])
                if value["oid"] not in hub.lfs:
                    return _refuse(400)
                files[value["path"]] = hub.lfs[value["oid"]]
                found.large.add(value["path"])
            if step["key"] == "deletedFile":
                del files[value["path"]]
        found.commits.append(files)
        found.branches[revision] = len(found.commits) - 1
        sha = found.sha(len(found.commits) - 1)
        return {"commitUrl": f"{hub.url}/{kind}/{owner}/{name}/commit/{sha}", "commitOid": sha}

    @app.get("/datasets/<owner>/<name>/resolve/<revision>/<path:path>", defaults={"kind": "datasets"})
    @app.get("/<owner>/<name>/resolve/<revision>/<path:path>", defaults={"kind": "models"})
    def resolve(kind, owner, name, revision, path):
        found = repository(kind, owner, name)
        number = commit_of(found, revision)
        data = found.commits[number].get(path)
        facts = {"X-Repo-Commit": found.sha(number)}
        if data is None:
            return flask.Response("", 404, {"X-Error-Code": "EntryNotFound", **facts})
        if path not in found.large:
            return _content(data, blob(data), **facts)
        digest = hashlib.sha256(data).hexdigest()
        facts |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        elsewhere = hub.url.replace("127.0.0.1", "localhost")  # huggingface_hub stays on the hub's own host
        return flask.Response("", 302, {"Location": f"{elsewhere}/cdn/{digest}?signature=very-secret", **facts})

    @app.get("/cdn/<digest>")
    def cdn(digest):
        return _content(hub.lfs[digest], digest)

    _add_buckets(app, hub)
    return app


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _content(data: bytes, etag: str, **headers: str) -> flask.Response:
    response = flask.Response(data, 200, {"Content-Type": "application/octet-stream", **headers})
    response.set_etag(etag)
    return response.make_conditional(flask.request, accept_ranges=True, complete_length=len(data))


def _add_buckets(app: flask.Flask, hub: UploadHub) -> None:
    """Serve buckets. hf_xet keeps their bytes in a folder, as it does for its own tests."""

    def bucket(owner: str, name: str) -> dict[str, tuple[bytes, str]]:
        found = hub.buckets.get(f"{owner}/{name}")
        if found is None:
            flask.abort(_refuse(404, "RepoNotFound"))
        return found

    @app.post("/api/buckets/<owner>/<name>")
    def create_bucket(owner, name):
        known = f"{owner}/{name}" in hub.buckets
        hub.buckets.setdefault(f"{owner}/{name}", {})
        return {"url": f"{hub.url}/buckets/{owner}/{name}"}, 409 if known else 200

    @app.get("/api/buckets/<owner>/<name>")
    def bucket_info(owner, name):
        files = bucket(owner, name)
        size = sum(len(data) for data, _ in files.values())
        now = "2026-11-01T00:00:00.000Z"
        return {"id": f"{owner}/{name}", "private": False, "createdAt": now, "size": size, "totalFiles": len(files)}

    def describe(files: dict[str, tuple[bytes, str]], path: str) -> dict:
        data, xet_hash = files[path]
        return {"type": "file", "path": path, "size": len(data), "xetHash": xet_hash}

    @app.get("/api/buckets/<owner>/<name>/tree")
    @app.get("/api/buckets/<owner>/<name>/tree/<path:prefix>")
    def bucket_tree(owner, name, prefix=""):
        files = bucket(owner, name)
        return [describe(files, path) for path in sorted(files) if path.startswith(prefix)]

    @app.post("/api/buckets/<owner>/<name>/paths-info")
    def bucket_paths(owner, name):
        files = bucket(owner, name)
        return [describe(files, path) for path in flask.request.json["paths"] if path in files]

    @app.get("/api/datasets/<owner>/<name>/xet-write-token/<revision>")
    @app.get("/api/buckets/<owner>/<name>/<any('xet-write-token', 'xet-read-token'):kind>")
    def token(owner, name, kind="", revision=""):
        facts = {"accessToken": "xet-secret", "casUrl": f"local://{hub.xet}", "exp": int(time.time()) + 3600}
        names = ("X-Xet-Access-Token", "X-Xet-Cas-Url", "X-Xet-Token-Expiration")
        return facts, 200, dict(zip(names, map(str, facts.values()), strict=True))

    @app.post("/api/buckets/<owner>/<name>/batch")
    def bucket_batch(owner, name):
        files = bucket(owner, name)
        for line in flask.request.get_data().splitlines():
            step = json.loads(line)
            if step["type"] == "addFile":
                files[step["path"]] = _read_xet(hub.xet, step["xetHash"]), step["xetHash"]
            if step["type"] == "deleteFile":
                del files[step["path"]]
        return {"success": True, "failed": []}

    @app.get("/buckets/<owner>/<name>/resolve/<path:path>")
    def bucket_file(owner, name, path):
        data, xet_hash = bucket(owner, name).get(path, (None, ""))
        if data is None:
            return _refuse(404, "EntryNotFound")
        route = f"{hub.url}/api/buckets/{owner}/{name}/xet-read-token"
        link = f'<{route}>; rel="xet-auth"'
        return _content(data, xet_hash, **{"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": link})


def _read_xet(folder: Path, xet_hash: str) -> bytes:
    """Return the bytes that hf_xet has stored in a folder."""
    import hf_xet

    target = folder / "read" / xet_hash
    target.parent.mkdir(exist_ok=True)
    wanted = hf_xet.PyXetDownloadInfo(str(target), xet_hash, None)
    hf_xet.download_files([wanted], f"local://{folder}", ("xet-secret", int(time.time()) + 3600), None, None)
    return target.read_bytes()
