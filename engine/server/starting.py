"""Stand-in while the model is being loaded: 503 to every request, on the server's own socket."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from engine.server.protocol import ApiError

MAX_BODY = 1 << 20  # bytes of a request that are read, so that its sender gets the response
TIMEOUT = 5.0  # s that a client may take to say what it wants


class _Handler(BaseHTTPRequestHandler):
    timeout = TIMEOUT

    def respond(self) -> None:
        error = ApiError(503, "the server is starting: the model is being loaded", code="starting")
        body = json.dumps(error.body).encode()
        with contextlib.suppress(OSError, ValueError):
            self.rfile.read(min(MAX_BODY, int(self.headers.get("Content-Length") or 0)))
        self.send_response(503)
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Retry-After", "1"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = respond

    def version_string(self) -> str:
        return "afs"

    def log_message(self, format: str, *args: object) -> None:
        pass  # the log is the server's


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away, or said nothing


@contextlib.contextmanager
def answering(listener: socket.socket) -> Iterator[None]:
    """Within, whoever asks on `listener`, which is left open, is told to come again."""
    server = _Server(listener.getsockname()[:2], _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    thread = Thread(target=server.serve_forever, args=(0.05,), name="afs-starting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
