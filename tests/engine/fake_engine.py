"""A stand-in for the asynchronous engine that the tests of the server share, and a server on a free port.

The stand-in answers with the tokens of REPLY over and over. Its tokenizer is the bundled model's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from engine.async_llm import EngineDead, QueueFull
from engine.errors import RequestError
from engine.model.config import ModelConfig
from engine.runtime.engine import EngineStats
from engine.runtime.request import Completion, TokenLogprobs, Update
from engine.sampling_params import SamplingParams
from engine.server.app import Settings
from engine.server.serve import Server
from engine.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data/models/olmo2-tiny"
REPLY = "def naïve(self):\n    return '日本' + \"é\"\n"


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def fake_llm(**fields: Any) -> Any:
    """What the server reads of an LLM."""
    engine = SimpleNamespace(
        max_batch=8, page_size=16, kv_cache="paged", backend="reference", device="cpu", dtype="bfloat16",
        torch_dtype=torch.bfloat16, step_tokens=2048,
    )  # fmt: skip

    def check_ids(ids: Sequence[int], where: str, field: str = "prompt") -> None:
        if ids and max(ids) >= 4096:
            raise RequestError(f"{where} token id {max(ids)}; ids are 0 to 4095", field)

    given = {"tokenizer": tokenizer(), "max_model_len": 2048, "engine": engine, "check_ids": check_ids, "core": None}
    return SimpleNamespace(**given | {"config": ModelConfig.from_file(TINY / "config.json")} | fields)


class FakeEngine:
    """Yields a token every `delay` s. `room` is how many requests it takes before it is full."""

    def __init__(self, delay: float = 0.0, room: int = 1000, with_text: bool = True) -> None:
        self.delay, self.room, self.with_text = delay, room, with_text
        self.streams: list[FakeStream] = []  # all there were
        self.failing: str | None = None  # how requests end: an error, deadline or abort
        self.failure: Exception | None = None  # what the whole engine died of
        self.entered = self.left = False

    async def __aenter__(self) -> FakeEngine:
        self.entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left = True
        for stream in self.streams:
            stream.abort()

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        session: str | None = None,
        add_special_tokens: bool = True,
    ) -> FakeStream:
        await asyncio.sleep(0)
        assert not isinstance(prompt, str)
        if self.failure:
            raise EngineDead("the engine has failed")
        if len(prompt) > 0 and max(prompt) >= 4096:
            raise RequestError(f"prompt holds token id {max(prompt)}; ids are 0 to 4095", "prompt")
        if sum(not stream.done for stream in self.streams) >= self.room:
            raise QueueFull(f"{self.room} requests wait already")
        asked = {"id": id, "priority": priority, "timeout": timeout, "session": session}
        self.streams.append(FakeStream(self, list(prompt), params or SamplingParams(), asked))
        return self.streams[-1]

    def stats(self) -> EngineStats:
        return EngineStats(
            running=sum(not stream.done for stream in self.streams), pages=100, pages_used=25, pages_cached=10,
            preemptions=2, steps=7, prompt_tokens=50, cached_tokens=20, generated_tokens=30,
            finished={"stop": 3, "length": 4, "abort": 1},
        )  # fmt: skip

    async def drain(self, timeout: float | None = None) -> None:
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while not all(stream.done for stream in self.streams):
            if time.monotonic() > end:
                for stream in self.streams:
                    stream.abort()
                return
            await asyncio.sleep(0.005)


class FakeStream:
    def __init__(self, engine: FakeEngine, prompt: list[int], params: SamplingParams, asked: dict[str, Any]) -> None:
        self.prompt_token_ids, self.params, self.asked, self.id = prompt, params, asked, asked["id"]
        self.arrival = time.perf_counter()
        self.done = self.aborted = False
        self._engine = engine
        self._updates = self._run()

    def abort(self) -> None:
        if not self.done:
            self.done = self.aborted = True

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def __aiter__(self) -> AsyncIterator[Update]:
        return self._updates

    async def _run(self) -> AsyncIterator[Update]:
        params = self.params
        reply = tokenizer().encode(REPLY)
        decoders = [tokenizer().stream() for _ in range(params.n)]
        texts = [""] * params.n
        for place in range(params.max_new_tokens):
            await asyncio.sleep(self._engine.delay)
            if self._engine.failure:
                raise EngineDead("the engine has failed")
            if self.aborted or self._engine.failing:
                break
            last = place == params.max_new_tokens - 1
            for index in range(params.n):
                token = reply[(place + index) % len(reply)]
                piece = decoders[index].push([token]) + (decoders[index].finish() if last else "")
                piece = piece if self._engine.with_text else ""
                texts[index] += piece
                logprobs = None if params.logprobs is None else [entry(token, params.logprobs)]
                done = self._completion(index, place + 1, texts[index], "length") if last else None
                self.done = self.done or last
                yield Update(index, piece, [token], logprobs, done)
        if params.max_new_tokens == 0 and not self._engine.failing:
            yield Update(0, "", [], [] if params.logprobs is not None else None, self._completion(0, 0, "", "length"))
        elif not self.done or self.aborted:
            reason = "abort" if self.aborted else self._engine.failing
            for index in range(params.n):
                yield Update(index, "", [], None, self._completion(index, 0, texts[index], reason))
        self.done = True

    def _completion(self, index: int, count: int, text: str, reason: Any) -> Completion:
        reply = tokenizer().encode(REPLY)
        ids = [reply[(place + index) % len(reply)] for place in range(count)]
        wanted = self.params.prompt_logprobs
        scored = None if wanted is None else [None, *(entry(t, wanted) for t in self.prompt_token_ids[1:])]
        return Completion(
            prompt_token_ids=self.prompt_token_ids,
            token_ids=ids,
            text=text,
            finish_reason=reason,
            ttft_ms=30.0,
            itl_ms=[20.0] * max(count - 1, 0),
            e2e_ms=30.0 + 20.0 * max(count - 1, 0),
            index=index,
            logprobs=None if self.params.logprobs is None else [entry(t, self.params.logprobs) for t in ids],
            prompt_logprobs=scored,
            cached_tokens=1,
            error="the model fell over" if reason == "error" else None,
        )


def entry(token: int, top: int) -> TokenLogprobs:
    """Made up: the token itself is the second most likely one."""
    others = [((token + 1 + rank) % 4096, -0.5 - rank) for rank in range(top)]
    listed = sorted([*others, (token, -1.0)], key=lambda pair: -pair[1])[:top]
    return TokenLogprobs(token, -1.0, 2, listed)


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    server: Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(
    engine: Any, llm: Any = None, grace: float = 5.0, max_connections: int = 2000, **settings: Any
) -> Iterator[Running]:
    """Serve `engine` on a free port while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        given = Settings(**{"models": ("tiny", "other"), **settings})
        server = Server(engine, llm or fake_llm(), given, grace, max_connections)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        found = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread)
        try:
            yield found
        finally:
            found.stop()
