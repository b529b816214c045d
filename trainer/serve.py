"""``python -m trainer.serve CHECKPOINT``: answer questions about videos over HTTP, as the OpenAI API does.

The same address shows a page on which people choose videos and ask about them. SIGTERM ends the server after the
answers that are under way.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from framestream.pipeline.utils.command_line import (
    CommandParser,
    describe_os_error,
    integer_option,
    name_option,
    number_option,
    path_option,
    run_safely,
)

if TYPE_CHECKING:
    from framestream.trainer.serving.config import ServingConfig

KEY_VARIABLE = "FRAMESTREAM_API_KEY"  #: environment variable with the API key
MIN_KEY = 16  #: characters of an API key
LOOPBACK = ("127.0.0.1", "::1", "localhost")  #: hosts that only this machine reaches
MIB = 1 << 20
MAX_MIB = 1 << 24  #: largest value of an option in MiB
PACKAGES = ("starlette", "uvicorn", "pydantic", "python_multipart", "prometheus_client")  #: of the extra ``serve``
MAX_WORD = 200  #: characters of a name


class ServeError(Exception):
    """Options that do not fit, or a machine that lacks something; one line with the fix."""


@run_safely("stopped", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.serve") -> int:
    """Run the command line; returns the exit status.

    The status is 0 after SIGTERM, 1 a file or weights that cannot be read, or an address that cannot be used, 2 bad
    input, 130 Ctrl-C.
    """
    options = _build_parser(prog).parse_args(arguments)
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.trainer.weights.tensor_files import WeightsError

    try:
        config = _read_config(options)
        _serve(options, config)
    except (ServeError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (WeightsError, OSError, ValueError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


def word_option(text: str) -> str:
    """Read the value of an option that is a name without spaces."""
    if not text.isprintable() or not text or " " in text or len(text) > MAX_WORD:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_WORD} characters without spaces, not {text!r:.40}")
    return text


def _build_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=prog, description="Answer questions about videos over HTTP, and show a page for it.")
    parser.add_argument("checkpoint", type=path_option, help="a finished run, or a folder of weights")
    parser.add_argument("--manifest", type=name_option, help="the stage's YAML (default: the run's own)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    parser.add_argument("--model-name", type=word_option, help="name of the model in requests (default: the folder's)")
    parser.add_argument(
        "--host", type=word_option, default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--port", type=integer_option(0, 65535), default=8000, help="0 for any free one (default %(default)s)"
    )
    parser.add_argument(
        "--api-key-file", type=path_option, help=f"file with the API key (default: the variable {KEY_VARIABLE})"
    )
    parser.add_argument("--no-api-key", action="store_true", help="allow requests without a key from other machines")
    parser.add_argument("--allow-urls", action="store_true", help="fetch media from public http and https addresses")
    _add_limits(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-batch",
        type=integer_option(1, 1024),
        default=8,
        help="answers that grow at the same time (default %(default)s)",
    )
    limits.add_argument(
        "--max-batch-tokens",
        type=integer_option(1, 1 << 30),
        default=131_072,
        help="tokens of all of them, prompts included (default %(default)s)",
    )
    limits.add_argument(
        "--max-queue",
        type=integer_option(1, 1 << 20),
        default=64,
        help="requests that wait; more are refused with 429 (default %(default)s)",
    )
    limits.add_argument(
        "--max-tokens", type=integer_option(1, 1 << 17), default=1024, help="longest answer (default %(default)s)"
    )
    limits.add_argument(
        "--max-request-mb",
        type=integer_option(1, MAX_MIB),
        default=64,
        help="MiB of a JSON request (default %(default)s)",
    )
    limits.add_argument(
        "--max-upload-mb",
        type=integer_option(1, MAX_MIB),
        default=512,
        help="MiB of an uploaded or fetched file (default %(default)s)",
    )
    limits.add_argument(
        "--store-mb",
        type=integer_option(1, MAX_MIB),
        default=4096,
        help="MiB of all files on the disk (default %(default)s)",
    )
    limits.add_argument(
        "--cache-mb",
        type=integer_option(0, MAX_MIB),
        default=1024,
        help="MiB of visual tokens kept between questions (default %(default)s)",
    )
    limits.add_argument(
        "--max-images", type=integer_option(1, 1 << 20), default=64, help="images of a request (default %(default)s)"
    )
    limits.add_argument(
        "--max-videos", type=integer_option(1, 1 << 20), default=8, help="videos of a request (default %(default)s)"
    )
    limits.add_argument(
        "--max-pixels",
        type=integer_option(1, 89_478_485),
        default=1 << 25,
        help="pixels of an image or of a video's frame (default %(default)s)",
    )
    limits.add_argument(
        "--max-frames",
        type=integer_option(1, 1 << 20),
        default=1024,
        help="sampled frames and tiles of a request (default %(default)s)",
    )
    limits.add_argument(
        "--max-seconds",
        type=number_option(0, 1e7, above=True),
        default=7200.0,
        help="seconds of a video, or of its named part (default %(default)s)",
    )
    limits.add_argument(
        "--decode-processes",
        type=integer_option(1, 256),
        default=2,
        help="files that are decoded at the same time (default %(default)s)",
    )
    limits.add_argument(
        "--decode-seconds",
        type=number_option(0, 86_400, above=True),
        default=120.0,
        help="seconds for decoding one file (default %(default)s)",
    )
    limits.add_argument(
        "--request-seconds",
        type=number_option(0, 86_400, above=True),
        default=600.0,
        help="seconds from a request to the end of its answer (default %(default)s)",
    )
    limits.add_argument(
        "--fetch-seconds",
        type=number_option(0, 86_400, above=True),
        default=30.0,
        help="seconds for fetching one file (default %(default)s)",
    )
    limits.add_argument(
        "--drain-seconds",
        type=integer_option(0, 86_400),
        default=30,
        help="seconds for the answers under way at SIGTERM (default %(default)s)",
    )


def _read_config(options: argparse.Namespace) -> ServingConfig:
    """Check what options cannot check alone."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeError(f"needs the package {missing[0]}; pip install -e '.[serve]'")
    from framestream.trainer.serving.config import ServingConfig

    key = _read_key(options)
    local = options.host in LOOPBACK
    if not local and not key and not options.no_api_key:
        raise ServeError(
            f"--host {options.host}: other machines could use the server without a key; set {KEY_VARIABLE}, "
            "or give --api-key-file or --no-api-key"
        )
    checkpoint = options.checkpoint.resolve()
    name = options.model_name or (checkpoint.parent if checkpoint.name == "final" else checkpoint).name
    return ServingConfig(
        model_name=name,
        api_key=key,
        hosts=(*LOOPBACK, "[::1]") if local else (),
        max_batch=options.max_batch,
        max_batch_tokens=options.max_batch_tokens,
        max_queue=options.max_queue,
        max_tokens=options.max_tokens,
        max_request_bytes=options.max_request_mb * MIB,
        max_upload_bytes=options.max_upload_mb * MIB,
        store_bytes=options.store_mb * MIB,
        cache_bytes=options.cache_mb * MIB,
        max_images=options.max_images,
        max_videos=options.max_videos,
        max_pixels=options.max_pixels,
        max_frames=options.max_frames,
        max_seconds=options.max_seconds,
        decode_processes=options.decode_processes,
        decode_seconds=options.decode_seconds,
        request_seconds=options.request_seconds,
        allow_urls=options.allow_urls,
        fetch_seconds=options.fetch_seconds,
    )


def _read_key(options: argparse.Namespace) -> str:
    """Return the API key, or an empty text for none."""
    if options.api_key_file is None:
        # decoding processes inherit the variables that are left
        key, source = os.environ.pop(KEY_VARIABLE, ""), KEY_VARIABLE
        if not key:
            return ""
    else:
        source = f"--api-key-file {options.api_key_file}"
        try:
            key = options.api_key_file.read_text(encoding="ascii").strip()
        except UnicodeDecodeError:
            key = ""
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ServeError(f"{source}: a key has at least {MIN_KEY} ASCII characters without spaces; write a longer one")
    return key


def _serve(options: argparse.Namespace, config: ServingConfig) -> None:
    """Load the model and serve until SIGTERM."""
    import uvicorn

    from framestream.trainer.inference.predictor import Predictor, resolve_run
    from framestream.trainer.serving.app import create_app

    with _listen(options.host, options.port) as listener:
        weights, manifest = resolve_run(options.checkpoint, options.manifest, options.set)
        app = create_app(Predictor(weights, manifest), manifest, config)
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=options.drain_seconds,
        )
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it has drained
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {config.model_name} on http://{shown}:{port}", flush=True)
        uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, before the model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise ServeError(f"--host {host} --port {port}: cannot be used ({reason}); choose another one") from None


if __name__ == "__main__":
    sys.exit(main())
