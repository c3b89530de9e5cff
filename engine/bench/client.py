"""Load for any OpenAI-compatible server, ours or another's: `afs bench serve` and the pipeline.

The client is open-loop: a request is sent at its time whether or not those before it are done, unless `clients` bounds
how many are on their way. Every answer is streamed; times are the client's, from sending: until the first token (TTFT),
between one piece of the answer and the next (ITL), until the end. Tokens are counted by the server (`usage`), else by a
tokenizer. What goes wrong is counted by kind, and a request that failed has no times.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from engine.bench.throughput import follow_progress
from engine.bench.workloads import Arrive, Outcome, SampleRequest, describe, failed, goodput, summarize

APIS = ("completions", "chat")
DONE = "[DONE]"


class EventParser:
    """The data of server-sent events, from bytes that may be cut anywhere.

    Lines end with CR, LF or both; several data lines make one event, joined by LF; comments and other fields are
    skipped, as is an event that the end of the stream cuts off.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._line = ""  # not ended yet
        self._after_cr = False  # an LF that comes next belongs to the CR before it
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of each event that ends in `chunk`."""
        events = []
        text = self._decoder.decode(chunk)
        if self._after_cr and text:
            text, self._after_cr = text.removeprefix("\n"), False
        self._after_cr = self._after_cr or text.endswith("\r")
        *lines, self._line = (self._line + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events


@dataclass(frozen=True)
class Endpoint:
    """Where and how requests are sent.

    Args:
        url: Its root, as http://127.0.0.1:8000, with or without /v1 behind it.
        model: The model's name in requests; may be empty for `bench` alone.
        api: "completions", which sends a request's text, or its token ids where it has none; "chat", which needs text.
        api_key: Sent as a bearer token.
        timeout: Seconds that a request may take until its end.
        body: Fields of every request beside ours. `ignore_eos` is not OpenAI's, but that of most servers one can run.
        count: Tokens of a text, where the server does not say how many it generated.

    Raises:
        ValueError: The address, api or timeout is not one.
    """

    url: str
    model: str
    api: str = "completions"
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "ignore_eos": True})
    count: Callable[[str], int] | None = None

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ValueError(f"api = {self.api!r}; it must be {' or '.join(APIS)}")
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout!r}; it must be seconds above 0")
        try:
            url = urlsplit(self.url)
            right = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # of the port
            right = False
        if not right:
            raise ValueError(f"url = {self.url!r}; it must be like http://127.0.0.1:8000")

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    def connect(self) -> aiohttp.ClientSession:
        """A client for as many requests at a time as one likes; to be made within an event loop."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        # A request's time is bounded as a whole, by asyncio.
        unbounded, connector = aiohttp.ClientTimeout(total=None, sock_connect=None), aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(headers=headers, connector=connector, timeout=unbounded)

    def message(self, request: SampleRequest) -> tuple[str, dict[str, Any]]:
        """The address and body for a request. Raises ValueError for a chat without text."""
        shared = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": request.new_tokens,
            **self.body,
        }
        if self.api == "completions":
            return f"{self.root}/completions", shared | {"prompt": request.text or request.prompt}
        if request.text is None:
            raise ValueError("api = 'chat' needs requests with text: give a tokenizer")
        return f"{self.root}/chat/completions", shared | {"messages": [{"role": "user", "content": request.text}]}


async def find_model(url: str, api_key: str | None = None, timeout: float = 30.0) -> str:
    """The name of the first model that the server lists.

    Raises:
        ValueError: It cannot be reached, or does not answer as an OpenAI-compatible server does.
    """
    server = Endpoint(url, "", api_key=api_key)
    try:
        async with asyncio.timeout(timeout), server.connect() as client, client.get(f"{server.root}/models") as answer:
            status, text = answer.status, await answer.text(errors="replace")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ValueError(f"{server.root}/models: {str(error) or type(error).__name__}") from None
    if status != 200:
        raise ValueError(f"{server.root}/models: HTTP {status}: {' '.join(text.split())[:300]}")
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{server.root}/models does not list a model as OpenAI's API does") from None


class _Refused(Exception):
    """An answer that is not what was asked for: kind, detail."""


@dataclass
class _Answer:
    """State of a streamed answer: what has come of it."""

    times: list[float] = field(default_factory=list)  # of each piece, in seconds of time.perf_counter
    text: list[str] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = False
    end: float = 0.0

    def take(self, data: str, now: float) -> None:
        """An event. Raises _Refused for an error or anything that is not a chunk of an answer."""
        try:
            chunk = json.loads(data)
        except ValueError:
            raise _Refused("not JSON", data) from None
        if not isinstance(chunk, dict):
            raise _Refused("not a chunk", data)
        if chunk.get("error"):
            raise _Refused("error in the stream", json.dumps(chunk["error"]))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise _Refused("not a chunk", data)
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        for choice in choices:
            if not isinstance(choice, dict) or not isinstance(delta := choice.get("delta") or {}, dict):
                raise _Refused("not a chunk", data)
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
            if not isinstance(text, str):
                raise _Refused("not a chunk", data)
            last = choice.get("finish_reason") is not None
            # A token may give no text yet; a chat's first chunk, which names the role, and its last one are no tokens.
            if text or not (last or "role" in delta):
                self.times.append(now)
                self.text.append(text)
            self.end = now
            self.finished |= last


async def send(client: aiohttp.ClientSession, server: Endpoint, request: SampleRequest, begin: float) -> Outcome:
    """Send a request now and read its answer; `begin` is when the run began, by time.perf_counter.

    An error of the network, the server or its answer is the outcome's: "HTTP 429", "timeout",
    "ClientConnectorError", "error in the stream", "cut off", "no tokens", …
    """
    url, body = server.message(request)
    sent, answer = time.perf_counter(), _Answer()
    try:
        async with asyncio.timeout(server.timeout), client.post(url, json=body) as response:
            if response.status != 200:
                raise _Refused(f"HTTP {response.status}", await response.text(errors="replace"))
            async for data in events(response):
                if data == DONE:
                    break
                answer.take(data, time.perf_counter())
        return _outcome(server, request, answer, sent, begin)
    except TimeoutError:
        return failed(sent - begin, "timeout", f"not done after {server.timeout:g} s")
    except aiohttp.ClientError as error:
        return failed(sent - begin, type(error).__name__, str(error))
    except _Refused as error:
        return failed(sent - begin, *error.args)


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    parser = EventParser()
    async for chunk in response.content.iter_any():
        for data in parser.feed(chunk):
            yield data


def _outcome(server: Endpoint, request: SampleRequest, answer: _Answer, sent: float, begin: float) -> Outcome:
    if not answer.finished:
        raise _Refused("cut off", f"no finish_reason after {len(answer.times)} pieces")
    new_tokens = answer.usage.get("completion_tokens")
    if new_tokens is None and server.count:
        new_tokens = server.count("".join(answer.text))
    if new_tokens is None:
        raise _Refused("no usage", "the server does not say how many tokens it generated, and there is no tokenizer")
    prompt_tokens = answer.usage.get("prompt_tokens", len(request.prompt))
    details = answer.usage.get("prompt_tokens_details") or {}
    cached_tokens = (details.get("cached_tokens") or 0) if isinstance(details, dict) else None
    if not all(isinstance(count, int) and count >= 0 for count in (new_tokens, prompt_tokens, cached_tokens)):
        raise _Refused("wrong usage", json.dumps(answer.usage))
    if not new_tokens:
        raise _Refused("no tokens", "the answer is empty")
    times = answer.times or [answer.end]  # a single token may come with the end
    return Outcome(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        begin=sent - begin,
        ttft_ms=(times[0] - sent) * 1e3,
        itl_ms=[(after - before) * 1e3 for before, after in pairwise(times)],
        e2e_ms=(answer.end - sent) * 1e3,
        cached_tokens=cached_tokens,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class LoadResult:
    """A run of requests against a server."""

    outcomes: list[Outcome]
    asked: list[SampleRequest]
    seconds: float  # from the first request's time until the last one's end
    late_ms: list[float]  # how much later than at its time each request was sent: the client's own delay

    def record(self, run: str, objectives: Mapping[str, float] | None = None, **shared: Any) -> dict[str, Any]:
        """One flat record for `engine.bench.workloads.render`; `run` is its name, `objectives` those of its goodput."""
        pairs = zip(self.outcomes, self.asked, strict=True)
        other = sum(outcome.error is None and outcome.new_tokens != asked.new_tokens for outcome, asked in pairs)
        found = {"goodput": goodput(self.outcomes, objectives, self.seconds)} if objectives else {}
        details = {outcome.error: outcome.detail for outcome in self.outcomes if outcome.error}
        return {
            "run": run,
            **shared,
            **summarize(self.outcomes, self.seconds),
            **found,
            "other_length": other,  # completed, but not with as many tokens as were asked for
            "late_ms_p99": describe(self.late_ms)["p99"],
            "error_details": details,  # the last one's of each kind
        }


async def run(server: Endpoint, requests: Sequence[SampleRequest], clients: int | None = None) -> LoadResult:
    """Send every request at its arrival, `clients` at a time at most (None: as many as arrive); wait for all answers.

    Raises:
        ValueError: `clients` is below 1, there are no requests, or one cannot be sent by this api; nothing is sent.
    """
    if clients is not None and clients < 1:
        raise ValueError(f"clients = {clients}; it must be at least 1")
    if not requests:
        raise ValueError("no requests to send")
    for request in requests:
        server.message(request)
    gate = asyncio.Semaphore(clients) if clients else contextlib.nullcontext()
    late_ms, ended = [0.0] * len(requests), 0

    async def one(index: int, request: SampleRequest) -> Outcome:
        nonlocal ended
        await asyncio.sleep(begin + request.arrival - time.perf_counter())
        if not clients:  # else the delay is the wait for a turn
            late_ms[index] = max(0.0, time.perf_counter() - begin - request.arrival) * 1e3
        async with gate:
            outcome = await send(client, server, request, begin)
        ended += 1
        return outcome

    with follow_progress(len(requests), "requests", lambda: ended):
        async with server.connect() as client:
            begin = time.perf_counter()
            tasks = []
            for pair in enumerate(requests):
                tasks.append(asyncio.create_task(one(*pair)))
                # Where all are due at once the first is sent before the last one's connection is opened.
                await asyncio.sleep(0)
            outcomes = await asyncio.gather(*tasks)
            seconds = time.perf_counter() - begin
    return LoadResult(list(outcomes), list(requests), seconds, late_ms)


Schedule = tuple[str, Arrive, int | None]  # its name, what gives requests their arrivals, clients at a time


def make_schedules(timed: Sequence[tuple[str, Arrive]], clients: Sequence[int]) -> list[Schedule]:
    """Each schedule of `parse_schedules` with each number of clients; with no bound where there is none."""
    if not clients:
        return [(name, given, None) for name, given in timed]
    return [
        (f"{count} clients" if name == "all at once" else f"{name}, {count} clients", given, count)
        for name, given in timed
        for count in clients
    ]


def make_body(ignore_eos: bool, more: str | None = None) -> dict[str, Any]:
    """Fields of every request: greedy, to the number of tokens asked for, and those of the JSON object `more`.

    Raises:
        ValueError: `more` is not a JSON object.
    """
    body: dict[str, Any] = {"temperature": 0.0} | ({"ignore_eos": True} if ignore_eos else {})
    try:
        return body | json.loads(more or "{}")
    except (ValueError, TypeError):
        raise ValueError(f"extra-body = {more!r}; it must be a JSON object") from None


async def bench(
    server: Endpoint,
    draw: Callable[[int], list[SampleRequest]],
    schedules: Sequence[Schedule],
    objectives: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """A record of each schedule. Where `server.model` is empty, it is the first that the server lists.

    draw: the requests of run 0, 1, …, other ones each time. One request is sent before, to see that the server answers.

    Raises:
        ValueError: That one failed (says how), the server lists no model, or as `run` does.
    """
    if not server.model:
        server = replace(server, model=await find_model(server.url, server.api_key))
    async with server.connect() as client:
        first = await send(client, server, draw(len(schedules))[0], time.perf_counter())
    if first.error:
        raise ValueError(f"{server.url} does not answer a request: {first.error}: {first.detail}")
    records = []
    for index, (name, given, clients) in enumerate(schedules):
        result = await run(server, given(draw(index)), clients)
        records.append(result.record(name, objectives, url=server.url, model=server.model, api=server.api))
    return records
