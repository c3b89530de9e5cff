"""What stands between the network and the routes: limits, the API key, request ids, one line of log an answer.

`Gate` wraps the application; `Connection` is uvicorn's HTTP/1.1 with limits on how slow a client may be.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.server.protocol import ApiError

log = logging.getLogger(__name__)
# Everything else needs the API key, where there is one.
OPEN_PATHS = frozenset({"/", "/docs", "/health", "/metrics", "/openapi.json", "/stats", "/version"})
MAX_HEAD = 32 * 1024  # bytes of a request's path and headers
# Asked for every second or so, and cheap: answered under any load, with a line of log only where they go wrong.
_POLLED = frozenset({"/health", "/metrics", "/stats"})
_GIVEN_ID = re.compile(rb"[!-~]{1,128}")


class ClientGone(Exception):
    """The client has closed its connection before it had its answer."""


class Gate:
    """Wraps an ASGI application.

    Args:
        app: What answers.
        api_key: The key that requests must bring as `Authorization: Bearer KEY`; None: no key.
        max_body: Bytes that a body may have.
        max_active: Requests answered at a time.
        answered: Told of each answer's path and status.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body: int,
        max_active: int,
        answered: Callable[[str, int], None],
    ) -> None:
        self._app, self._max_body, self._max_active, self._answered = app, max_body, max_active, answered
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        # What the routes add here is in the line of log.
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        status, ended = 0, False

        async def counted_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        self._active += 1
        try:
            self._check(scope, headers)
            if scope["method"] == "POST":
                receive = await self._read(receive, headers)
            await self._app(scope, receive, counted_send)
        except ClientGone:
            status = 499
        except ApiError as error:
            await _send_error(error, counted_send)
        except Exception:
            log.exception("request failed", extra={"request_id": request_id.decode()})
            if status:
                raise  # the connection is closed where the answer breaks off
            await _send_error(ApiError(500, "the server failed; its log says how"), counted_send)
        finally:
            self._active -= 1
            route = scope.get("route")
            self._answered(getattr(route, "path", "other"), status)
            log.log(
                logging.DEBUG if scope["path"] in _POLLED and status == 200 else logging.INFO,
                "answered" if ended else "broken off",
                extra={
                    "request_id": request_id.decode(),
                    "client": (scope.get("client") or ("",))[0],
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "ms": round((time.perf_counter() - begin) * 1e3, 1),
                    **facts,
                },
            )

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        # h11 has a limit too, but only for what comes in pieces.
        head = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])
        if head > MAX_HEAD:
            raise ApiError(431, f"path and headers have {head} bytes; at most {MAX_HEAD} are taken")
        if self._active > self._max_active and scope["path"] not in _POLLED:  # a busy server is not an ill one
            raise ApiError(429, f"{self._max_active} requests are being answered", headers={"Retry-After": "1"})
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        given = headers.get(b"authorization")
        if given is None:
            raise ApiError(401, "no API key was given; send it as 'Authorization: Bearer KEY'", "Authorization")
        if not hmac.compare_digest(given, self._key):
            raise ApiError(401, "the API key is not the server's", "Authorization")

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        """Take the whole body; what the application may receive from."""
        too_large = ApiError(413, f"the body is larger than {self._max_body} bytes, the most that is taken")
        if int(headers.get(b"content-length", b"0")) > self._max_body:  # h11 lets nothing but digits through
            raise too_large
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                raise too_large
        first: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal first
            message, first = first, None
            return message if message is not None else await receive()

        return replay


async def _send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()  # ASCII: a message may quote what is not valid Unicode
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Connection(H11Protocol):
    """HTTP/1.1 that waits neither for slow requests nor for slow readers."""

    request_timeout = 30.0  # s for a whole request, headers and body, and for the first one on a connection to begin
    write_timeout = 60.0  # s in which a client must take something of what waits to be sent

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _watch_reading(self) -> None:
        """Run a clock from a request's beginning until it has been read."""
        unread = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if unread and self._reading is None:
            self._reading = self.loop.call_later(self.request_timeout, self._too_slow)
        elif not unread and self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _too_slow(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(408, f"the request was not complete after {self.request_timeout:g} s")
        else:  # the answer is there already, as for a body that is too large
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers where a request cannot be read as HTTP, or its headers are too large."""
        self._refuse(400, f"{msg} Headers may have {self.config.h11_max_incomplete_event_size} bytes.")

    def _refuse(self, status: int, message: str) -> None:
        body = json.dumps(ApiError(status, message).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
