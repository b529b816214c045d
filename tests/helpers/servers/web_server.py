"""Web server on the loopback interface whose routes, good or bad, are functions of a test."""

from __future__ import annotations

import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from framestream.tools.fetch.http.retry import FetchLimits

#: Limits with which a test takes seconds.
QUICK = FetchLimits(seconds=30, bytes=1 << 20, retries=3, stall=0.5, backoff=0.01)


class Server:
    """Answer GET by ``routes[path without query](request)``, or by 404 if there is no route.

    ``asked`` is the path and the headers of every request; header names are in lower case.
    """

    def __init__(self):
        self.routes, self.asked = {}, []
        self.closing = threading.Event()  # ends stalled requests
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16

            def do_GET(self):
                server.asked.append((self.path, {name.lower(): text for name, text in self.headers.items()}))
                route = server.routes.get(self.path.partition("?")[0], missing)
                try:
                    route(self)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True

            def log_message(self, *_):
                pass

            def answer(self, status=200, body=b"", length=None, **headers):
                """Send headers, with Content-Length ``length`` (of the body if None), and a body."""
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                for name, text in headers.items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                self.wfile.write(body)
                if length not in (None, len(body)):
                    self.close_connection = True

            def reset(self):
                """Break the connection as a crash would."""
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def stall(self):
                """Send nothing more until the test is over."""
                self.wfile.flush()
                server.closing.wait(60)

            def wanted(self, data):
                """Return start and end of the requested range; None if the complete file is requested."""
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not found or self.headers.get("If-Range", self.etag) != self.etag:
                    return None
                return int(found[1]), min(int(found[2] or len(data)) + bool(found[2]), len(data))

            etag = '"one"'

            def serve(self, data, **headers):
                """Send a file as a good server does, also by ranges."""
                headers = {"ETag": self.etag, **headers}
                part = self.wanted(data)
                if part is None:
                    return self.answer(body=data, **headers)
                start, end = part
                if start >= len(data):
                    return self.answer(416, Content_Range=f"bytes */{len(data)}")
                headers |= {"Content_Range": f"bytes {start}-{end - 1}/{len(data)}"}
                return self.answer(206, data[start:end], **headers)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients close connections early
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self, path):
        """Return the Range header of every request for ``path``."""
        return [headers.get("range") for asked, headers in self.asked if asked.partition("?")[0] == path]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


def missing(request):
    """Answer 404."""
    request.answer(404, b"no such file")


def turns(*routes):
    """Return a route that behaves like each of ``routes`` in turn, and then like the last."""
    left = list(routes)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)
