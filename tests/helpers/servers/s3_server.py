"""moto's S3 server on the loopback interface, and an environment that leads there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of an empty S3 until the end of the block."""
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        running.stop()


def s3_environment(endpoint: str, folder: Path) -> dict[str, str]:
    """Variables that name ``endpoint`` and a login, and keep botocore from looking elsewhere for them."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
