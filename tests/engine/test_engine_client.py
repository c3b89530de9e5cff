"""The load client: server-sent events, what it sends, what it measures, and how it counts what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bench.client import Endpoint, EventParser, LoadResult, bench, find_model, make_body, make_schedules, run
from engine.bench.workloads import Mix, Outcome, SampleRequest, arrive, parse_schedules

# --- events -----------------------------------------------------------------------------------------------------------


def parse(*chunks: bytes) -> list[str]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_events():
    assert parse(b"data: a\n\ndata:b\r\n\r\ndata:  c\r\rdata: cut off") == ["a", "b", " c"]
    assert parse(b"\xef\xbb\xbf: a comment\nevent: x\nid: 3\ndata: 1\ndata: 2\ndata\n\n\n\n") == ["1\n2\n"]
    assert parse(b"data: \xc3", b"\xa9\r", b"\n", b"\r\n") == ["é"]
    assert parse(b"database: no\n\n") == []


ENDINGS = st.sampled_from(["\n", "\r\n", "\r"])
TEXT = st.text(alphabet=st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=12)


@given(
    st.lists(st.lists(TEXT, min_size=1, max_size=3), max_size=5),
    ENDINGS,
    st.lists(st.integers(0, 200), max_size=12),
    st.booleans(),
)
def test_events_are_the_same_however_they_are_cut(
    events: list[list[str]], ending: str, cuts: list[int], comments: bool
):
    lines = []
    for event in events:
        lines += [": a comment"] if comments else []
        lines += [f"data: {line}" for line in event] + [""]
    stream = "".join(line + ending for line in lines).encode()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[a:b] for a, b in pairwise(places)]
    assert parse(*chunks) == parse(stream) == ["\n".join(event) for event in events]


# --- a server on loopback ---------------------------------------------------------------------------------------------

Write = Callable[[bytes], Awaitable[None]]


def event(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def text_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage_chunk(prompt: int, new: int, **details: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "prompt_tokens_details": details or None}
    return {"choices": [], "usage": usage}


@dataclass
class FakeServer:
    """Speaks as much HTTP as the client needs; `answer` writes the body of an answer, whole or not."""

    answer: Callable[[dict[str, Any], Write], Coroutine[Any, Any, None]]
    status: int = 200
    models: Any = field(default_factory=lambda: {"data": [{"id": "tiny"}]})
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:]) if name}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            path = head[0].split()[1]
            self.requests.append((path, headers, json.loads(body or "{}")))
            writer.write(f"HTTP/1.1 {self.status} x\r\nconnection: close\r\ncontent-type: x\r\n".encode())
            if path.endswith("/models"):
                said = json.dumps(self.models).encode()
                writer.write(b"content-length: %d\r\n\r\n%s" % (len(said), said))
            else:
                writer.write(b"transfer-encoding: chunked\r\n\r\n")

                async def write(data: bytes) -> None:
                    writer.write(b"%x\r\n%s\r\n" % (len(data), data) if data else b"0\r\n\r\n")
                    await writer.drain()

                self.running += 1
                self.most_running = max(self.most_running, self.running)
                try:
                    await self.answer(self.requests[-1][2], write)
                finally:
                    self.running -= 1
            await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[FakeServer]:
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        async with server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self


async def good(asked: dict[str, Any], write: Write) -> None:
    """`max_tokens` tokens, the first after 50 ms, then one every 20 ms; the last comes with the reason."""
    count = asked["max_tokens"]
    for index in range(count):
        await asyncio.sleep(0.05 if index == 0 else 0.02)
        await write(event(text_chunk("a", "length" if index == count - 1 else None)))
    await write(event(usage_chunk(len(asked["prompt"]), count, cached_tokens=2)) + event("[DONE]"))
    await write(b"")


def saying(*data: Any, end: bool = True) -> Callable[[dict[str, Any], Write], Coroutine[Any, Any, None]]:
    async def answer(_: dict[str, Any], write: Write) -> None:
        for item in data:
            await write(event(item))
        if end:
            await write(b"")

    return answer


def load(
    fake: FakeServer, requests: list[SampleRequest], clients: int | None = None, **fields: Any
) -> LoadResult:  # fmt: skip
    async def main() -> LoadResult:
        async with fake.serve():
            return await run(Endpoint(fake.url, "tiny", **fields), requests, clients)

    return asyncio.run(main())


def only(fake: FakeServer, request: SampleRequest | None = None, **fields: Any) -> Outcome:
    (outcome,) = load(fake, [request or SampleRequest([1, 2, 3], 4)], **fields).outcomes
    return outcome


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_a_completion_is_asked_for_by_token_ids_or_text():
    fake = FakeServer(good)
    load(
        fake,
        [SampleRequest([1, 2, 3], 2), SampleRequest([1], 1, text="hi")],
        api_key="secret",
        body={"ignore_eos": True},
        clients=1,
    )
    (path, headers, first), (_, _, second) = fake.requests
    assert path == "/v1/completions" and headers["authorization"] == "Bearer secret"
    assert first == {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2,
                     "ignore_eos": True, "prompt": [1, 2, 3]}  # fmt: skip
    assert second["prompt"] == "hi" and "secret" not in repr(Endpoint(fake.url, "tiny", api_key="secret"))


def test_a_chat_is_asked_for_by_text():
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in ("a", "", "b")]
    last = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    fake = FakeServer(saying(role, *chunks, last, usage_chunk(9, 3), "[DONE]"))
    outcome = only(fake, SampleRequest([1], 3, text="hi"), api="chat")
    assert fake.requests[0][0] == "/v1/chat/completions"
    assert fake.requests[0][2]["messages"] == [{"role": "user", "content": "hi"}]
    # The role is no token; one that gives no text yet is.
    assert (outcome.error, outcome.prompt_tokens, outcome.new_tokens, len(outcome.itl_ms)) == (None, 9, 3, 2)
    with pytest.raises(ValueError, match="api = 'chat' needs requests with text"):
        only(fake, SampleRequest([1], 3), api="chat")
    assert len(fake.requests) == 1


def test_addresses():
    assert {Endpoint(url, "m").root for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/")} == {
        "http://h:1/v1"
    }
    for url in ("h:1", "", "ftp://h", "http://", "http://h:65536", "http://h:x"):
        with pytest.raises(ValueError, match="url = "):
            Endpoint(url, "m")
    with pytest.raises(ValueError, match="api = 'x'; it must be completions or chat"):
        Endpoint("http://h", "m", api="x")
    with pytest.raises(ValueError, match="timeout = 0"):
        Endpoint("http://h", "m", timeout=0)


def test_the_servers_model_is_found():
    async def main(fake: FakeServer) -> str:
        async with fake.serve():
            return await find_model(fake.url)

    assert asyncio.run(main(FakeServer(good))) == "tiny"
    for fake, message in (
        (FakeServer(good, models={"data": []}), "does not list a model"),
        (FakeServer(good, models=[1]), "does not list a model"),
        (FakeServer(good, status=503), "models: HTTP 503: "),
    ):
        with pytest.raises(ValueError, match=message):
            asyncio.run(main(fake))
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1/v1/models: "):
        asyncio.run(find_model("http://127.0.0.1:1"))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_times_are_the_clients():
    outcome = only(FakeServer(good), SampleRequest([1, 2, 3, 4, 5], 4))
    assert (outcome.prompt_tokens, outcome.new_tokens, outcome.cached_tokens, outcome.error) == (5, 4, 2, None)
    assert 50 <= outcome.ttft_ms < 250 and len(outcome.itl_ms) == 3 and min(outcome.itl_ms) > 5
    assert outcome.e2e_ms == pytest.approx(outcome.ttft_ms + sum(outcome.itl_ms))
    assert outcome.tpot_ms == pytest.approx(sum(outcome.itl_ms) / 3)


def test_the_loop_is_open():
    """All are under way together, each sent at its own time; with `clients` no more than these are."""
    fake = FakeServer(good)
    result = load(fake, arrive([SampleRequest([1], 5)] * 8, rate=200.0, kind="fixed"))
    begins = [outcome.begin for outcome in result.outcomes]
    assert fake.most_running == 8 and begins == pytest.approx([index / 200 for index in range(8)], abs=0.1)
    assert result.seconds < 8 * 0.13 and max(result.late_ms) < 100
    fake = FakeServer(good)
    result = load(fake, [SampleRequest([1], 2)] * 6, clients=2)
    assert fake.most_running == 2 and result.seconds > 3 * 0.07 and all(o.error is None for o in result.outcomes)


def test_a_record_of_a_run():
    fake = FakeServer(good)
    result = load(fake, [SampleRequest([1, 2], 2), SampleRequest([1], 3)])
    record = result.record("8 clients", {"ttft_ms": 1e4, "tpot_ms": 0.0}, gpu="none")
    assert (record["run"], record["gpu"], record["completed"], record["new_tokens"]) == ("8 clients", "none", 2, 5)
    assert record["goodput"] == 0 and record["errors"] == {} and record["other_length"] == 0
    assert record["output_throughput"] == pytest.approx(5 / result.seconds)
    assert result.record("x", {"ttft_ms": 1e4})["goodput"] == pytest.approx(2 / result.seconds)
    assert "goodput" not in result.record("x")


def test_tokens_are_counted_where_the_server_does_not():
    silent = saying(text_chunk("a"), text_chunk("bc", "stop"), "[DONE]")
    outcome = only(FakeServer(silent), count=len)
    assert (outcome.prompt_tokens, outcome.new_tokens) == (3, 3)
    assert load(FakeServer(silent), [SampleRequest([1], 4)], count=len).record("x")["other_length"] == 1
    assert only(FakeServer(silent)).error == "no usage"


def test_a_single_token_may_come_with_the_end():
    outcome = only(FakeServer(saying(text_chunk("", "length"), usage_chunk(3, 1))), SampleRequest([1], 1))
    assert outcome.error is None and outcome.ttft_ms == outcome.e2e_ms > 0 and outcome.itl_ms == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "kind", "detail"),
    [
        ([text_chunk("a"), {"error": {"message": "out of pages"}}], "error in the stream", "out of pages"),
        ([text_chunk("a"), "{not"], "not JSON", "{not"),
        (["[1]"], "not a chunk", "[1]"),
        ([{"object": "x"}], "not a chunk", "object"),
        ([{"choices": [1]}], "not a chunk", "choices"),
        ([{"choices": [{"delta": "x"}]}], "not a chunk", "delta"),
        ([{"choices": [{"text": 5}]}], "not a chunk", "text"),
        ([text_chunk("a"), "[DONE]"], "cut off", "no finish_reason after 1 pieces"),
        ([], "cut off", "after 0 pieces"),
        ([text_chunk("", "stop"), usage_chunk(3, 0)], "no tokens", "empty"),
        ([text_chunk("a", "stop"), {"choices": [], "usage": {"completion_tokens": "1"}}], "wrong usage", "completion"),
        ([text_chunk("a", "stop"), usage_chunk(-1, 1)], "wrong usage", "-1"),
    ],
)
def test_a_wrong_answer_is_counted(data: list[Any], kind: str, detail: str):
    outcome = only(FakeServer(saying(*data)))
    assert outcome.error == kind and detail in outcome.detail


def test_errors_of_the_server_and_the_network_are_counted_by_kind():
    busy = FakeServer(saying("too many requests"), status=429)
    outcome = only(busy)
    assert outcome.error == "HTTP 429" and "too many requests" in outcome.detail
    assert only(FakeServer(saying(text_chunk("a"), end=False))).error == "ClientPayloadError"

    async def stuck(_: dict[str, Any], write: Write) -> None:
        await write(event(text_chunk("a")))
        await asyncio.sleep(5)

    begin = time.perf_counter()
    outcome = only(FakeServer(stuck), timeout=0.2)
    assert outcome.error == "timeout" and time.perf_counter() - begin < 3
    (refused,) = asyncio.run(run(Endpoint("http://127.0.0.1:1", "m"), [SampleRequest([1], 1)])).outcomes
    assert refused.error == "ClientConnectorError"


def test_the_others_go_on():
    async def sometimes(asked: dict[str, Any], write: Write) -> None:
        await (good if asked["prompt"] != [7] else saying({"error": "bad luck"}))(asked, write)

    result = load(FakeServer(sometimes), [SampleRequest([token], 2) for token in (5, 7, 6, 7)])
    assert [outcome.error for outcome in result.outcomes] == [None, "error in the stream"] * 2
    record = result.record("x")
    assert (record["completed"], record["failed"], record["errors"]) == (2, 2, {"error in the stream": 2})
    assert record["error_details"] == {"error in the stream": '"bad luck"'} and record["ttft_ms_p50"] >= 50


def test_a_mistake_of_ours_is_not_an_outcome(monkeypatch: pytest.MonkeyPatch):
    def broken(self: EventParser, chunk: bytes) -> list[str]:
        raise KeyError("ours")

    monkeypatch.setattr(EventParser, "feed", broken)
    with pytest.raises(KeyError, match="ours"):
        only(FakeServer(good))


def test_wrong_arguments():
    server = Endpoint("http://127.0.0.1:1", "m")
    with pytest.raises(ValueError, match="clients = 0; it must be at least 1"):
        asyncio.run(run(server, [SampleRequest([1], 1)], clients=0))
    with pytest.raises(ValueError, match="no requests"):
        asyncio.run(run(server, []))


# --- the command ------------------------------------------------------------------------------------------------------


def test_bench_is_a_record_a_schedule():
    fake, mix = FakeServer(good), Mix(3, 2, 4, 2)

    async def main(url: str = "", model: str = "") -> list[dict[str, Any]]:
        async with fake.serve():
            schedules = make_schedules(parse_schedules("inf,50", "fixed", 0), [])
            server = Endpoint(url or fake.url, model)
            return await bench(server, lambda index: mix.requests(99, index), schedules, {"ttft_ms": 1e4})

    records = asyncio.run(main())
    found = [(r["run"], r["completed"], r["api"], r["model"], r["url"]) for r in records]
    assert found == [(name, 3, "completions", "tiny", fake.url) for name in ("all at once", "50 requests/s")]
    assert all(record["goodput"] > 0 for record in records)
    prompts = [str(asked["prompt"]) for path, _, asked in fake.requests if path.endswith("completions")]
    assert len(prompts) == 1 + 6 == len(set(prompts)), "no request is sent twice"
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1 does not answer a request: ClientConnectorError"):
        asyncio.run(main("http://127.0.0.1:1", "tiny"))


def test_schedules_and_bodies():
    timed = parse_schedules("inf,4", "fixed", 0)
    made = [(name, clients) for name, _, clients in make_schedules(timed, [8, 32])]
    assert made == [
        ("8 clients", 8),
        ("32 clients", 32),
        ("4 requests/s, 8 clients", 8),
        ("4 requests/s, 32 clients", 32),
    ]
    assert make_body(True) == {"temperature": 0.0, "ignore_eos": True}
    assert make_body(False, '{"temperature": 1, "top_k": 3}') == {"temperature": 1, "top_k": 3}
    for text in ("[1]", "{", "3"):
        with pytest.raises(ValueError, match=r"extra-body = .* must be a JSON object"):
            make_body(True, text)


def test_the_client_is_not_bound_by_a_pool():
    """As many connections as requests: a pool of aiohttp's usual size would send the 101st late."""

    async def connect() -> tuple[int, float | None]:
        async with Endpoint("http://127.0.0.1:1", "m").connect() as client:
            assert client.connector
            return client.connector.limit, client.timeout.total

    assert asyncio.run(connect()) == (0, None)
