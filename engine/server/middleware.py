"""Middleware between HTTP and the routes: limits, the API key, request ids, one line of log a response."""

from __future__ import annotations

import asyncio
import ctypes
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.server.connection import MAX_HEAD
from engine.server.protocol import RETRY, ApiError

log = logging.getLogger(__name__)
# Everything else needs the API key, where there is one.
OPEN_PATHS = frozenset({"/", "/docs", "/health", "/metrics", "/openapi.json", "/stats", "/version"})
MAX_VALUES = 2**19  # of a body, at most: while it is read as JSON nothing else runs, for half a second with so many
BODIES = 64  # of the largest size, which may be held at a time
# Asked for every second or so, and cheap: answered under any load, with a line of log only where they go wrong.
_POLLED = frozenset({"/health", "/metrics", "/stats"})
_LARGE = 2**20  # bytes of a body whose memory is given back
_GIVEN_ID = re.compile(rb"[!-~]{1,128}")


class ClientGone(Exception):
    """The client has closed its connection before it had its response."""


@dataclass(frozen=True)
class Limits:
    """Limits on what reaches the routes.

    Args:
        api_key: The key that requests must bring as `Authorization: Bearer KEY`; None: no key.
        hosts: Names under which the server may be asked, without ports; `*.example.com` is all below it; empty: any.
        max_body: Bytes that a body may have.
        max_active: Requests answered at a time.
    """

    api_key: str | None
    hosts: tuple[str, ...]
    max_body: int
    max_active: int


class RequestMiddleware:
    """Wraps an ASGI application.

    Args:
        app: What answers.
        limits: What it is asked.
        answered: Told of each response's path and status.
        closing: Whether connections should end with the responses on their way.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, answered: Callable[[str, int], None], closing: Callable[[], bool]
    ) -> None:
        self._app, self._limits, self._answered, self._closing = app, limits, answered, closing
        self._active = 0
        self._held = 0  # bytes of bodies of requests on their way
        self._trim: asyncio.TimerHandle | None = None

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
        state = scope.setdefault("state", {})
        state["facts"] = facts
        method = scope["method"]
        if method == "HEAD":  # as GET; uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        status, ended, held = 0, False, 0

        async def counted_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [(b"x-request-id", request_id)]
                if self._closing():
                    added.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        self._active += 1
        try:
            self._check(scope, headers)
            if method == "POST":
                body = await self._read(receive, headers)
                held = len(body)
                self._held += held
                receive = _replay(body, receive)
                del body
            await self._app(scope, receive, counted_send)
        except ClientGone:
            status = state.get("refused", 499)
        except ApiError as error:
            await _send_error(error, counted_send)
        except asyncio.CancelledError:
            if not self._closing():
                raise
            # The server does not wait longer for a client that takes nothing; the line below is enough about it.
        except Exception:
            log.exception("request failed", extra={"request_id": request_id.decode()})
            if status:
                raise  # the connection is closed where the response breaks off
            await _send_error(ApiError(500, "the server failed; its log says how"), counted_send)
        finally:
            self._active -= 1
            self._held -= held
            if held >= _LARGE:
                self._give_back()
            self._answered(_path(scope), status)
            log.log(
                logging.DEBUG if scope["path"] in _POLLED and status == 200 else logging.INFO,
                "answered" if ended else "broken off",
                extra={
                    "request_id": request_id.decode(),
                    "client": (scope.get("client") or ("",))[0],
                    "method": method,
                    "path": scope["path"],
                    "status": status,
                    "ms": round((time.perf_counter() - begin) * 1e3, 1),
                    **facts,
                },
            )

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        limits = self._limits
        if scope["http_version"] not in ("1.0", "1.1"):
            said = f"this is HTTP/{scope['http_version']}, and the server speaks HTTP/1.1"
            raise ApiError(505, said, headers={"Connection": "close"})
        # The reader has a limit too, but only for what comes in pieces.
        head = len(scope["raw_path"]) + len(scope["query_string"])
        head += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if head > MAX_HEAD:
            raise ApiError(431, f"path and headers have {head} bytes; at most {MAX_HEAD} are taken")
        host = headers.get(b"host", b"").decode("latin-1")
        if limits.hosts and not any(fits(host, pattern) for pattern in limits.hosts):
            raise ApiError(403, f"the server is not to be asked as {host!r:.200}", "Host", "host_not_allowed")
        if self._active > limits.max_active and scope["path"] not in _POLLED:  # a busy server is not an ill one
            raise ApiError(429, f"{limits.max_active} requests are being answered", headers=RETRY)
        if limits.api_key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
        if scheme.lower() != b"bearer":
            why = "no API key was given; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, why, "Authorization", headers={"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(key.strip(), limits.api_key.encode()):
            wrong = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
            raise ApiError(401, "the API key is not the server's", "Authorization", headers=wrong)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """The whole body."""
        most = self._limits.max_body
        too_large = ApiError(413, f"the body is larger than {most} bytes, the most that is taken")
        if int(headers.get(b"content-length", b"0")) > most:  # h11 lets nothing but digits through
            raise too_large
        pieces: list[bytes] = []
        size = 0
        more = True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                pieces.append(message.get("body", b""))
                more = message.get("more_body", False)
                size += len(pieces[-1])
                self._held += len(pieces[-1])
                if size > most:
                    raise too_large
                if self._held > BODIES * most:
                    raise ApiError(429, f"{self._held} bytes of bodies are being read", headers=RETRY)
        finally:
            self._held -= size
        body = b"".join(pieces)
        if body.count(b",") > MAX_VALUES:
            raise ApiError(413, f"the body holds more than {MAX_VALUES} commas, the most that is taken")
        return body

    def _give_back(self) -> None:
        """Let the system have the memory that a large body took, soon: all that stood for it is forgotten then."""
        if self._trim is None:
            self._trim = asyncio.get_running_loop().call_later(1.0, self._trim_now)

    def _trim_now(self) -> None:
        self._trim = None
        asyncio.get_running_loop().run_in_executor(None, trim)


def trim() -> None:
    """Give memory that is free to the system, where the C library can: it keeps what threads have freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def fits(host: str, pattern: str) -> bool:
    """Whether a Host header names what `pattern` does: any port of the name, or, with `*.`, of a name below it."""
    name = re.sub(r":\d*$", "", host).strip("[]").removesuffix(".").lower()
    pattern = pattern.strip("[]").lower()
    return pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def _path(scope: Scope) -> str:
    """The path of the route that was asked for, reached or not; "other" where there is none."""
    route = scope.get("route")
    if route is None and "app" in scope:
        route = next((found for found in scope["app"].routes if found.matches(scope)[0] != Match.NONE), None)
    return getattr(route, "path", "other")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A source that the application receives from: the body, then what comes."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

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
