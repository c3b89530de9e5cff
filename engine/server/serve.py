"""Start the server, and end it so that nobody is left without a response."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from engine.async_llm import AsyncLLM
from engine.model.cost import kv_bytes_per_token
from engine.model.tensors import parameter_count
from engine.server.app import Settings, create_app, max_active
from engine.server.connection import Connection, Connections
from engine.server.logs import is_text, log_to_stderr, show_summary
from engine.server.starting import answering

if TYPE_CHECKING:
    from engine.llm import LLM

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_CONNECTIONS = 2**14  # where there may be as many open files
ACCEPTED = 64  # connections accepted in one go, before any of them can be closed for want of room
BACKLOG = 2048  # that wait to be accepted


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT takes no new requests, gives those that run `grace` seconds to
    end, and then ends their streams with an error event. A second signal ends them at once.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        llm: LLM,
        settings: Settings,
        grace: float = 30.0,
        max_connections: int = MAX_CONNECTIONS,
        announce: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._grace, self._hurry, self._announce = engine, grace, False, announce
        self.app = create_app(engine, llm, settings)
        service = self.app.state.service
        connections = Connections(max_connections, lambda status: service.answered("other", status))
        super().__init__(
            uvicorn.Config(
                self.app,
                http=functools.partial(Connection, connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]
                # For the last events once nothing runs; a client that does not read them is cut off.
                timeout_graceful_shutdown=5,
                backlog=ACCEPTED,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_log_once_a_minute())
        await super().startup(sockets)
        for listener in sockets or ():  # asyncio takes the one number for both
            listener.listen(BACKLOG)
        self._announce()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's clock. A server whose engine has failed ends: whoever started it may start it anew."""
        if self._engine.failure is not None and not self.should_exit:
            log.error("the engine has failed", exc_info=self._engine.failure)
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.service.draining = True
        log.info("shutting down", extra={"running": self._engine.stats().running, "grace_s": self._grace})
        # Meanwhile the listener is open, so that who asks is told: /health too says that the server is about to go.
        draining = asyncio.create_task(self._drain())
        end = time.monotonic() + self._grace + 5
        while not (draining.done() or self.force_exit or self._engine.failure) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
        # Nobody waits for a response now: what is left ends with the engine.
        draining.cancel()
        for problem in await asyncio.gather(draining, return_exceptions=True):
            if isinstance(problem, Exception):
                log.error("the engine did not drain", exc_info=problem)
        log.info("stopped")

    async def _drain(self) -> None:
        patient = asyncio.create_task(self._engine.drain(self._grace))
        try:
            while not patient.done() and not self._hurry:
                await asyncio.sleep(0.05)
            if not patient.done():
                await self._engine.drain(0)
        finally:
            patient.cancel()
        if patient.done():
            patient.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's handler of signals, of which the second is ours; a third SIGINT leaves everything as it is."""
        if self.should_exit and not self._hurry:
            self._hurry = True
        else:
            super().handle_exit(sig, frame)


def serve(
    load: Callable[[], LLM],
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    grace: float = 30.0,
    log_level: str = "info",
    log_format: str = "auto",
) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        load: Makes the model. Meanwhile the address is taken, and every request answered 503.
        settings: Names, limits, and the API key.
        host: The address to listen on. Beyond loopback, set an API key.
        port: 0 takes a free one; the log says which.
        grace: Seconds that requests have to end in when the server is to stop.
        log_level: debug, info, warning or error.
        log_format: json, text, or auto: text where stderr is a terminal.

    Raises:
        ValueError: `grace` is negative, there is no such level or format, or the chat template is broken.
        OSError: The address cannot be listened on.
        RuntimeError: The engine has failed.
    """
    if not grace >= 0:
        raise ValueError(f"grace = {grace}; it must be 0 or more seconds")
    log_to_stderr(log_level, log_format)
    connections = room_for_connections()
    with socket.create_server((host, port), family=_family(host), backlog=BACKLOG) as listener:
        if host not in LOOPBACK and settings.api_key is None:
            log.warning("anyone who reaches this address can use the model: no API key is set", extra={"host": host})
        with answering(listener):
            llm = load()
            _ = llm.core  # with its cache, and its graphs
        wanted = max_active(llm, settings)
        if connections < wanted:
            log.warning(
                "the limit on open files leaves no room for as many connections as requests may be answered: raise it "
                "(ulimit -n), or lower max_waiting",
                extra={"connections": connections, "requests": wanted},
            )
        engine = AsyncLLM(llm, settings.max_waiting)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"

        def announce() -> None:
            facts = {"url": url, **_facts(llm, settings, engine.stats().pages), "max_connections": connections}
            if is_text(log_format):
                show_summary(facts)
            log.info("serving", extra={"url": url} if is_text(log_format) else facts)

        server = Server(engine, llm, settings, grace, connections, announce)
        # What is loaded by now stays, and is a great many objects: the garbage collector, which would stop every thread
        # for a tenth of a second and more to look at them all, just when many requests come, leaves them out.
        gc.collect()
        gc.freeze()
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once the server has ended
                server.run([listener])
        finally:
            gc.unfreeze()
        if engine.failure is not None:
            raise RuntimeError("the engine has failed") from engine.failure


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def _facts(llm: LLM, settings: Settings, pages: int) -> dict[str, Any]:
    """Facts for the log: what is served, on what, and within which limits."""
    engine = llm.engine
    paged = engine.kv_cache == "paged"
    tokens = pages * engine.page_size if paged else engine.max_batch * llm.max_model_len
    return {
        "models": settings.models,
        "architecture": llm.config.architecture.name,
        "parameters": parameter_count(llm.config),
        "device": engine.device,
        "dtype": engine.dtype,
        "backend": engine.backend,
        "max_model_len": llm.max_model_len,
        "kv_tokens": tokens,
        "kv_bytes": tokens * kv_bytes_per_token(llm.config, engine.torch_dtype),
        "max_batch": engine.max_batch,
        "max_step_tokens": engine.step_tokens,
        "max_waiting": settings.max_waiting,
        "max_body": settings.max_body,
        "request_timeout": settings.request_timeout,
    }


def room_for_connections() -> int:
    """Raise the limit on open files as far as this process may; how many connections there is room for then."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(ValueError, OSError):  # macOS takes less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    # Some to spare for the engine, and for those that are closed and not gone yet.
    return max(16, min(MAX_CONNECTIONS, soft - taken - 2 * ACCEPTED - 64))


def _log_once_a_minute() -> Any:
    """asyncio's handler of errors: to the log, one a minute of those that come again and again."""
    last = float("-inf")

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            if time.monotonic() - last > 60:
                last = time.monotonic()
                log.error("no connection can be accepted", extra={"why": str(error)})
        else:
            log.error(context["message"], exc_info=error)

    return handle
