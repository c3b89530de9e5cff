"""HTTP/1.1 on connections of which there may be a limited number, and which wait neither for slow requests nor for slow
readers: uvicorn's protocol with what it leaves open.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.server.protocol import ApiError

log = logging.getLogger(__name__)
MAX_HEAD = 32 * 1024  # bytes of a request's path and headers
_SAY_AGAIN = 60.0  # s until it is logged again that there is no room


class Connections:
    """State that the connections of a server share.

    Args:
        most: Connections that may be open; to make room for one more, that which has waited for a request, or for
            the rest of one, for the longest time is closed.
        refused: Told of the status of each refusal that neither a route nor the middleware sees.
    """

    def __init__(self, most: int, refused: Callable[[int], None]) -> None:
        self.most, self.refused = most, refused
        self.waiting: dict[Connection, None] = {}  # for a request, or the rest of one; the longest first
        self._said = float("-inf")

    def make_room(self) -> bool:
        """Close the connection that has waited longest. False where none waits."""
        found = next((connection for connection in self.waiting if connection.can_go()), None)
        if time.monotonic() - self._said > _SAY_AGAIN:
            self._said = time.monotonic()
            log.warning("no room for more connections: those that wait are closed", extra={"connections": self.most})
        if found is not None:
            del self.waiting[found]
            found.go()
        return found is not None


class _Reader(h11.Connection):
    """Remembers what is wrong with what it reads, which uvicorn drops."""

    problem: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        try:
            return super().next_event()
        except h11.RemoteProtocolError as problem:
            self.problem = problem
            raise


class Connection(H11Protocol):
    """A connection to a client.

    Args:
        shared: What all connections of the server share.
        given: What uvicorn gives its protocols.
    """

    request_timeout = 30.0  # s for a whole request, headers and body, and for the first one on a connection to begin
    write_timeout = 60.0  # s in which a client must take something of what waits to be sent
    linger = 2.0  # s in which a client that is refused may read why

    def __init__(self, shared: Connections, **given: Any) -> None:
        super().__init__(**given)
        self.conn: _Reader = _Reader(h11.SERVER, MAX_HEAD)
        self._shared = shared
        self._begin = b""  # what the client sent first
        self._refused = False
        self._newest: Any = None  # the request that came last
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._shared.most and not self._shared.make_room():
            self._refuse(503, f"{self._shared.most} connections are open, the most that there may be", at_once=True)
            return
        self._watch_reading()
        self._watch_waiting()

    def data_received(self, data: bytes) -> None:
        if self._refused:  # nobody reads it, but a client that is still sending would not read the response else
            return
        self._begin = self._begin or data[:2]
        super().data_received(data)
        self._watch_reading()
        self._watch_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        self._shared.waiting.pop(self, None)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """End with the response that is on its way; a request that is still coming has none."""
        if self.cycle is not None and not self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY:
            self._refuse(503, "the server is shutting down", at_once=True)
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("writing", self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("writing")

    def _start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def _watch_reading(self) -> None:
        """Run a clock from a request's beginning until it has been read."""
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._start("reading", self.request_timeout, self._too_slow)
        else:
            self._stop("reading")

    def _watch_waiting(self) -> None:
        """Be among those that wait until a request has been read, and again once it has been answered."""
        answered = self.cycle is None or self.cycle.response_complete
        if self.cycle is not self._newest:  # it has just begun to ask
            self._newest = self.cycle
            self._shared.waiting.pop(self, None)
        if answered or self.conn.their_state is h11.SEND_BODY:
            self._shared.waiting.setdefault(self)
        else:
            self._shared.waiting.pop(self, None)

    def can_go(self) -> bool:
        """Whether closing the connection makes room: one with something to send stays until that is taken."""
        return not self.transport.is_closing() and not self.transport.get_write_buffer_size()

    def go(self) -> None:
        """Make room for another connection."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:
            self._refuse(503, "there is no room to wait for the rest of this request", at_once=True)

    def _too_slow(self) -> None:
        self._refuse(408, f"the request was not complete after {self.request_timeout:g} s")

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: some clients offer HTTP/2 with every request, and go on without it."""

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be read as HTTP, or whose headers are too large."""
        problem = self.conn.problem
        if self._begin == b"\x16\x03":
            self._refuse(400, "this is TLS, and the server speaks plain HTTP: ask for http://, or through a proxy")
        elif problem is not None and problem.error_status_hint == 431:
            self._refuse(431, f"path and headers have more than {MAX_HEAD} bytes, the most that is taken")
        else:
            self._refuse(getattr(problem, "error_status_hint", 400), f"the request is not HTTP/1.1: {problem or msg}")

    def _refuse(self, status: int, message: str, at_once: bool = False) -> None:
        """Answer with an error, of which nobody else knows, and close the connection: at once, or when the client has
        had time to read that.
        """
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is on its way, or there already
            self.transport.abort()
            return
        self._refused = True
        unanswered = self.cycle is not None and not self.cycle.response_complete
        body = json.dumps(ApiError(status, message).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if unanswered and self.scope["method"] == "HEAD":
            body = b""
        head = h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if unanswered:  # the middleware is reading its body, and logs it
            self.scope.setdefault("state", {})["refused"] = status
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        else:
            facts = {"status": status, "client": (self.client or ("",))[0], "why": message}
            log.log(logging.DEBUG if at_once else logging.INFO, "refused", extra=facts)
            self._shared.refused(status)
        if at_once:
            self.transport.close()
            return
        self.flow.resume_reading()
        self.transport.write_eof()
        self._start("lingering", self.linger, self.transport.abort)
