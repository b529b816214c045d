"""A shard root on the servers of this machine: web server, hub and the three clouds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.helpers.servers.cloud_server import cloud_server
from tests.helpers.servers.fetch_hub import serve_hub
from tests.helpers.servers.s3_server import s3_environment, s3_server
from tests.helpers.servers.web_server import Server

Asked = Callable[[], list[str]]

KINDS = ("http", "hf", "s3", "gs", "az")


@contextlib.contextmanager
def served_root(kind: str, root: Path) -> Iterator[tuple[str, Asked | None]]:
    """Serve ``root`` until the end of the block; yield its address, and a function that lists the paths asked for.

    There is no such function for ``s3``.
    """
    files = {f"root/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
    serve = _serve_web if kind in ("http", "hf") else _serve_bucket
    with pytest.MonkeyPatch.context() as patch, serve(kind, files, patch) as served:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield served


@contextlib.contextmanager
def _serve_web(kind: str, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Asked | None]]:
    with Server() as server:
        if kind == "hf":
            patch.setattr(constants, "ENDPOINT", server.url)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            serve_hub(server, files)
            yield "hf://datasets/me/data/root", lambda: [path for path, _ in server.asked]
            return
        for path, data in files.items():
            server.routes[f"/{path}"] = lambda request, data=data: request.serve(data)
        yield f"{server.url}/root", lambda: [path for path, _ in server.asked]


@contextlib.contextmanager
def _serve_bucket(kind: str, files: dict[str, bytes], patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Asked | None]]:
    with s3_server() if kind == "s3" else cloud_server(kind) as server:
        variables = s3_environment(server, Path("/none")) if kind == "s3" else server.environment()
        for name, text in variables.items():
            patch.setenv(name, text)
        if kind == "s3":
            import boto3

            client = boto3.client("s3", endpoint_url=server)
            client.create_bucket(Bucket="shards")
            for path, data in files.items():
                client.put_object(Bucket="shards", Key=path, Body=data)
            yield "s3://shards/root", None
            return
        server.objects.update({f"shards/{path}": data for path, data in files.items()})
        yield f"{kind}://shards/root", lambda: server.asked
