"""A server of a tiny model in a thread of the test's process, over real connections."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import torch
import uvicorn
import yaml

from framestream.pipeline import load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.trainer.inference.predictor import Predictor, resolve_run
from framestream.trainer.serving.app import create_app
from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.weights.load import save_weights
from tests.helpers.model.weights import initialised
from tests.helpers.paths import ROOT

CHAT = "/v1/chat/completions"
MODEL = "toy"


def write_run(folder: Path) -> Path:
    """Write a model that was never trained; return the folder of its run."""
    settings = {
        "stage": 2,
        "output": str(folder / MODEL),
        "data": {"entries": [{"annotation": "none.json"}]},
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 8, "size": 128},
        "images": {"max_grid": 2},
        "text": {"tokenizer": str(ROOT / "tests" / "golden" / "tokens_labels" / "tokenizer"), "max_tokens": 1024},
        "batching": {"global_batch": 6, "row_multiple": 4},
        "model": {
            "vision_tower": {"width": 32, "depth": 3, "heads": 2, "table_side": 8, "group_tokens": 1024},
            "language_model": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 1024,
                "max_position_embeddings": 2048,
            },
        },
        "init_from": {"vision_tower": "random", "connector": "random", "language_model": "random"},
        "train": {"vision_tower": {"train": True, "lr": 1e-3}, "dtype": "fp32"},
    }
    for part in ("connector", "language_model"):
        settings["train"][part] = {"train": True, "lr": 1e-3}
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(settings))
    manifest = load_manifest(path)
    model = initialised(manifest)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(30)  # or every answer is the same
    save_weights(model, folder / MODEL / "final", manifest)
    (folder / MODEL / "manifest.yaml").write_text(yaml.safe_dump(to_dict(manifest)))
    return folder / MODEL


class AnsweringServer:
    """A running server, and requests to it."""

    def __init__(self, url: str, predictor: Predictor) -> None:
        self.url, self.predictor = url, predictor
        self.client = httpx2.Client(base_url=url, timeout=60, trust_env=False)

    def ask(self, content: Any, **more: Any) -> httpx2.Response:
        """Ask one question."""
        return self.client.post(CHAT, json=question(content, **more))

    def text(self, content: Any, **more: Any) -> str:
        """Return the answer to one question."""
        response = self.ask(content, **more)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels."""
        found = re.search(rf"^{name} (\S+)$", self.client.get("/metrics").text, re.M)
        assert found, name
        return float(found[1])

    def wait_until(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 20
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} stays {found}"
            time.sleep(0.01)


def question(content: Any, **more: Any) -> dict[str, Any]:
    """Return the body of a request with one question."""
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


def data_url(path: Path, kind: str = "video/mp4") -> str:
    """Return a file as a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def video_part(path: Path, **more: Any) -> dict[str, Any]:
    """Return the part of a message that shows a video."""
    return {"type": "video_url", "video_url": {"url": data_url(path), **more}}


@contextlib.contextmanager
def answering(run: Path, **limits: Any) -> Iterator[AnsweringServer]:
    """Serve a run with these fields of :class:`ServingConfig`."""
    weights, manifest = resolve_run(run)
    predictor = Predictor(weights, manifest)
    app = create_app(predictor, manifest, ServingConfig(**{"model_name": MODEL, **limits}))
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(app, http="h11", ws="none", log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    found = AnsweringServer(f"http://127.0.0.1:{listener.getsockname()[1]}", predictor)
    try:
        yield found
    finally:
        found.client.close()
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()
