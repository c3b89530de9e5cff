"""Start the server, and end it so that nobody is left without an answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from engine.async_llm import AsyncLLM
from engine.server.app import Settings, create_app
from engine.server.gate import MAX_HEAD, Connection
from engine.server.starting import answering

if TYPE_CHECKING:
    from engine.llm import LLM

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


def log_to_stderr(level: str = "info") -> None:
    """Write the logs of the server and of uvicorn as JSON lines to stderr.

    Raises:
        ValueError: There is no such level.
    """
    if level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"log_level = {level!r}; it must be debug, info, warning or error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, least in (("engine", logging.DEBUG), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(max(logging.getLevelNamesMapping()[level.upper()], least))


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT takes no new requests, gives those that run `grace` seconds to
    end, and then ends their streams with an error event. A second signal ends them at once.
    """

    def __init__(self, engine: AsyncLLM, llm: LLM, settings: Settings, grace: float = 30.0) -> None:
        self._engine, self._grace, self._hurry = engine, grace, False
        self.app = create_app(engine, llm, settings)
        super().__init__(
            uvicorn.Config(
                self.app,
                http=Connection,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=15,
                # For the error events; a client that does not read them is cut off.
                timeout_graceful_shutdown=int(grace) + 5,
                h11_max_incomplete_event_size=MAX_HEAD,
            )
        )

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's clock. A server whose engine has failed ends: whoever started it may start it anew."""
        if self._engine.failure is not None and not self.should_exit:
            log.error("the engine has failed", exc_info=self._engine.failure)
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.service.draining = True
        log.info("shutting down", extra={"running": self._engine.stats().running, "grace_s": self._grace})
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        # Nobody waits for an answer now: what is left ends with the engine.
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
) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args:
        load: Makes the model. Meanwhile the address is taken, and every request answered 503.
        settings: Names, limits, and the API key.
        host: The address to listen on. Beyond loopback, set an API key.
        port: 0 takes a free one; the log says which.
        grace: Seconds that requests have to end in when the server is to stop.
        log_level: debug, info, warning or error.

    Raises:
        ValueError: `grace` is negative, or there is no such level.
        OSError: The address cannot be listened on.
        RuntimeError: The engine has failed.
    """
    if not grace >= 0:
        raise ValueError(f"grace = {grace}; it must be 0 or more seconds")
    log_to_stderr(log_level)
    with socket.create_server((host, port), family=_family(host), backlog=2048) as listener:
        if host not in LOOPBACK and settings.api_key is None:
            log.warning("anyone who reaches this address can use the model: no API key is set", extra={"host": host})
        with answering(listener):
            llm = load()
            _ = llm.core  # with its cache, and its graphs
        engine = AsyncLLM(llm, settings.max_waiting)
        server = Server(engine, llm, settings, grace)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        log.info("serving", extra={"url": url, "models": settings.models, "max_model_len": llm.max_model_len})
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
