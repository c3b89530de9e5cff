"""Requests that come and go at any time: `LLM` behind a thread of its own, with a stream of updates for each request.

Three kinds of threads share the work: the caller's event loop takes requests and gives updates out; one thread steps
the engine; one turns tokens into text and watches for stop strings. Prompts become token ids on an `Encoder`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TypeVar

from engine.llm import LLM, StreamingRequest
from engine.runtime.engine import EngineStats
from engine.runtime.request import Update, completion
from engine.sampling_params import SamplingParams

T = TypeVar("T")


class QueueFull(RuntimeError):
    """More requests wait than may."""


class EngineDead(RuntimeError):
    """The engine's thread has ended by an error, or was never started."""


class Encoder:
    """Threads that turn texts into token ids beside everything else: long texts one at a time, so that neither short
    ones nor the memory wait for them.
    """

    LONG = 2**16  # characters

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(2, "afs-tokenize")
        self._long = ThreadPoolExecutor(1, "afs-tokenize-long")

    async def run(self, length: int, encode: Callable[[], T]) -> T:
        """The result of `encode`, which turns `length` characters into ids."""
        threads = self._long if length >= self.LONG else self._short
        return await asyncio.get_running_loop().run_in_executor(threads, encode)

    def shutdown(self) -> None:
        """End the threads when they have done what they are at."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)


class Stream:
    """The updates of one prompt's completions: an asynchronous iterator, which ends after the last completion.

    Leaving it early aborts nothing: use it as a context manager, whose end aborts what is left.
    """

    def __init__(self, engine: AsyncLLM, id: str, lives: list[StreamingRequest]) -> None:
        self.id, self.prompt_token_ids = id, list(lives[0].request.tokens)
        self.arrival = lives[0].request.entered
        self._engine, self._lives = engine, lives
        self._updates: asyncio.Queue[Update | BaseException] = asyncio.Queue()
        self._open = len(lives)  # completions whose last update has not been given out

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Update:
        if not self._open:
            raise StopAsyncIteration
        update = await self._updates.get()
        if isinstance(update, BaseException):
            self._open = 0
            raise EngineDead(f"the engine has failed: {update!r}") from update
        self._open -= update.completion is not None
        return update

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._open:
            self.abort()

    def abort(self) -> None:
        """End the completions that have not ended; their pages are free for the engine's next step."""
        self._engine._command(lambda: self._engine._end(self._lives))


class AsyncLLM:
    """An `LLM` for many tasks of one event loop, as an asynchronous context manager.

    Args:
        llm: What runs; nobody else may use it meanwhile. Its cache is taken on entry.
        max_waiting: Requests that may wait for their turn.
    """

    def __init__(self, llm: LLM, max_waiting: int = 1024) -> None:
        if max_waiting < 1:
            raise ValueError(f"max_waiting = {max_waiting}; it must be at least 1")
        self.llm, self.max_waiting = llm, max_waiting
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # for the engine's thread; None: the end
        # For the text's thread.
        self._touched: SimpleQueue[list[StreamingRequest] | BaseException | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._of_request: dict[object, tuple[StreamingRequest, Stream]] = {}
        self._numbers = itertools.count()
        self._encoder = Encoder()
        self._threads: list[Thread] = []
        self._failure: BaseException | None = None
        self._closing = False
        # Requests that were submitted, and those that the engine's thread has taken: each counted by one thread.
        self._submitted = self._taken = 0

    async def __aenter__(self) -> AsyncLLM:
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(None, lambda: self.llm.core)
        self._threads = [
            Thread(target=target, name=name, daemon=True)
            for target, name in ((self._run_engine, "afs-engine"), (self._run_text, "afs-text"))
        ]
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        for stream in list(self._streams.values()):
            stream.abort()
        self._commands.put(None)
        for thread in self._threads:
            await self._loop.run_in_executor(None, thread.join)
        self._encoder.shutdown()

    @property
    def failure(self) -> BaseException | None:
        """What has ended the engine's threads, if something has."""
        return self._failure

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
    ) -> Stream:
        """Let a prompt wait for its turn.

        Args:
            prompt: Text or token ids.
            params: Default SamplingParams().
            id: Its name; no two that are on their way have the same. Default: one of its own.
            priority: 0 is served first.
            timeout: Seconds from now after which it ends with finish_reason "deadline".
            session: Whose it is: pages of a session are forgotten together, those longest unused first.
            add_special_tokens: Whether the tokenizer adds what it adds around a text.

        Raises:
            ValueError: The prompt or the params are wrong, or too large for the model or the cache; nothing has
                changed.
            QueueFull: As many wait as may.
            EngineDead: The engine has failed or was not started.
        """
        params = params or SamplingParams()
        self._check_open()
        waiting = self.stats().waiting
        if waiting + params.n > self.max_waiting:
            raise QueueFull(f"{waiting} requests wait and {params.n} more would; at most {self.max_waiting} may")
        name = f"request-{next(self._numbers)}" if id is None else id
        self._submitted += params.n
        try:
            if isinstance(prompt, str):
                ids = await self._encoder.run(
                    len(prompt), lambda: self.llm.token_ids(prompt, "the prompt", add_special_tokens)
                )
                self._check_open()
            else:
                # At once: of many requests that come together the first is the engine's before the others are read.
                ids = self.llm.token_ids(prompt, "the prompt")
            self.llm.check(ids, params, "the prompt")
            lives = self.llm.requests(ids, params, name, priority, timeout, session=session)
            for live in lives:
                self.llm.core.check(live.request)
            if name in self._streams:
                raise ValueError(f"id {name!r} is that of a request on its way")
        except BaseException:
            self._submitted -= params.n
            raise
        stream = self._streams[name] = Stream(self, name, lives)
        for live in lives:
            self._of_request[live.request] = live, stream
        self._command(lambda: self._add(lives))
        return stream

    def stats(self) -> EngineStats:
        """Counts of the engine, those that its thread has not taken yet among the waiting."""
        stats = self.llm.core.stats()
        stats.waiting += self._submitted - self._taken
        return stats

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests, wait for those on their way, for `timeout` seconds at most, and abort the rest."""
        self._closing = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._streams and (end is None or time.monotonic() < end):
            await asyncio.sleep(0.01)
        for stream in list(self._streams.values()):
            stream.abort()
        while self._streams and self._failure is None:
            await asyncio.sleep(0.01)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineDead(f"the engine has failed: {self._failure!r}") from self._failure
        if not self._threads:
            raise EngineDead("the engine was not started; use `async with AsyncLLM(llm) as engine`")
        if self._closing:
            raise EngineDead("the engine is shutting down")

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)

    # --- the engine's thread ---

    def _add(self, lives: list[StreamingRequest]) -> None:
        for live in lives:
            self._taken += 1
            self.llm.core.add(live.request)

    def _end(self, lives: list[StreamingRequest]) -> None:
        ended = [live for live in lives if live.request.finish_reason is None]
        for live in ended:
            self.llm.core.end(live.request, "abort")
        if ended:
            self._touched.put(ended)

    def _run_engine(self) -> None:
        core = self.llm.core
        try:
            while True:
                # Without requests it sleeps until there is a command.
                block = not len(core)
                try:
                    while True:
                        command = self._commands.get(block)
                        if command is None:
                            self._touched.put(None)
                            return
                        command()
                        block = not len(core)
                except Empty:
                    pass
                touched = [self._of_request[request][0] for request in core.step() if request in self._of_request]
                if touched:
                    self._touched.put(touched)
        except BaseException as error:
            self._failure = error
            self._touched.put(error)

    # --- the text's thread ---

    def _run_text(self) -> None:
        while True:
            touched = self._touched.get()
            if touched is None:
                return
            if isinstance(touched, BaseException):
                self._loop.call_soon_threadsafe(self._fail, touched)
                return
            try:
                updates = [(live, update) for live in touched if (update := self._update(live))]
            except BaseException as error:
                self._failure = error
                self._loop.call_soon_threadsafe(self._fail, error)
                return
            if updates:
                self._loop.call_soon_threadsafe(self._give_out, updates)

    def _update(self, live: StreamingRequest) -> Update | None:
        """What a request has got since the last one; None where nothing, or where its last one has been."""
        request, text = live.request, live.text
        if live.done:
            return None
        ended = request.finish_reason is not None  # asked first: what the engine appends, it appends before that
        begin = text.count
        if live.take():
            self._command(lambda: self._stop(live))
            ended = True
        if text.count == begin and not live.pieces and not ended:
            return None
        piece = "".join(live.pieces)
        live.pieces.clear()
        live.done = ended
        logprobs = None if request.params.logprobs is None else request.logprobs[begin : text.count]
        tokens = request.generated_from(begin)[: text.count - begin]
        return Update(request.index, piece, tokens, logprobs, completion(request, text) if ended else None)

    def _stop(self, live: StreamingRequest) -> None:
        """On the engine's thread: a stop string has ended it."""
        if live.request.finish_reason is None:
            self.llm.core.end(live.request, "stop")

    # --- the event loop's thread ---

    def _give_out(self, updates: list[tuple[StreamingRequest, Update]]) -> None:
        for live, update in updates:
            _, stream = self._of_request[live.request]
            stream._updates.put_nowait(update)
            if update.completion:
                del self._of_request[live.request]
                if all(other.done for other in stream._lives):
                    self._streams.pop(stream.id, None)

    def _fail(self, error: BaseException) -> None:
        for stream in self._streams.values():
            stream._updates.put_nowait(error)
        self._streams.clear()
        self._of_request.clear()
