"""The server under clients that leave, dawdle, ask too much or may not ask, and when it is told to stop."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fake_engine import ROOT, FakeEngine, Running, eventually, fake_llm, running

import engine.server.serve as serving
from engine.server import middleware
from engine.server.connection import Connection
from engine.server.logs import log_to_stderr

BODY = {"prompt": "hello", "max_tokens": 2000}


def message(body: Any, path: str = "/v1/completions", **headers: str) -> bytes:
    """A request as it is on the wire."""
    content = json.dumps(body).encode()
    given = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@pytest.fixture
def slow() -> Iterator[tuple[FakeEngine, Running]]:
    """An engine whose requests would take a minute."""
    engine = FakeEngine(delay=0.03)
    with running(engine, grace=0.2) as server:
        yield engine, server


# --- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", ["a", "b", "c"]])
def test_leaving_aborts(slow: tuple[FakeEngine, Running], stream: bool, prompt: Any):
    engine, server = slow
    expected = 1 if isinstance(prompt, str) else len(prompt)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(message({**BODY, "prompt": prompt, "stream": stream}))
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        eventually(lambda: len(engine.streams) == expected)
    eventually(lambda: all(s.aborted for s in engine.streams))


def test_leaving_at_every_point(slow: tuple[FakeEngine, Running]):
    """Whatever has been sent or read by then: nothing goes on running, and the next request is answered."""
    engine, server = slow
    whole = message({**BODY, "stream": True})
    for end in (0, 1, 20, len(whole) - 5, len(whole)):
        for reset in (False, True):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(whole[:end])
                if reset:  # RST in place of FIN
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    for read in (1, 200, 1000):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(whole)
            while read > 0:
                read -= len(client.recv(min(read, 100)))
    eventually(lambda: all(s.done for s in engine.streams))
    with httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        eventually(lambda: client.get("/stats").json()["running"] == 0)


def test_many_leave_at_random_times(slow: tuple[FakeEngine, Running]):
    engine, server = slow

    def visit(number: int) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(message({**BODY, "stream": bool(number % 2)}))
            time.sleep(number * 0.01)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: all(s.done for s in engine.streams))


# --- clients that dawdle ----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "request_timeout", 0.3)
    monkeypatch.setattr(Connection, "write_timeout", 0.3)


@pytest.mark.parametrize("sent", [b"", b"GET /he", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", message(BODY)[:-3]])
def test_slow_requests(impatient: None, sent: bytes):
    engine = FakeEngine()
    with running(engine) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(5)
        client.sendall(sent)
        answer = b"".join(iter(lambda: client.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
        assert not engine.streams


def test_a_request_in_pieces_is_no_slow_one(impatient: None):
    with running(FakeEngine()) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(5)
        whole = message({"prompt": "x", "max_tokens": 1})
        for begin in range(0, len(whole), 40):
            client.sendall(whole[begin : begin + 40])
            time.sleep(0.01)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_answers_may_take_longer_than_requests(impatient: None):
    with running(FakeEngine(delay=0.05)) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 12}).status_code == 200


def test_slow_readers_are_cut_off(impatient: None):
    engine = FakeEngine()
    with running(engine) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        # Enough to fill the system's buffers.
        client.sendall(message({**BODY, "prompt": ["x", "y"], "logprobs": 20, "n": 5, "stream": True}))
        eventually(lambda: len(engine.streams) == 2 and all(s.aborted for s in engine.streams), 30)


# --- clients that ask too much ----------------------------------------------------------------------------------------


def test_large_bodies():
    engine = FakeEngine()
    with running(engine, max_body=10_000) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json={"prompt": "x" * 9000, "max_tokens": 1}).status_code != 413
        answer = client.post("/v1/completions", json={"prompt": "x" * 10_000})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        # without a length, in chunks that do not end
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.settimeout(5)
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            answered = b""
            for _ in range(100):
                raw.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            answered = raw.recv(1000)
            assert answered.startswith(b"HTTP/1.1 413")
        count = len(engine.streams)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:  # a lie is believed before it is read
            raw.sendall(message({}, **{"Content-Length": "99999999999"}))
            raw.settimeout(5)
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")
        assert len(engine.streams) == count
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


LARGE = b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 40_000 + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status", "said"),
    [
        (LARGE, 431, "at most 32768|more than 32768"),
        (LARGE.replace(b"a" * 40_000, b"a" * 400_000), 431, "more than 32768"),
        (LARGE[:-4], 431, "more than 32768"),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "at most 32768|more than 32768"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(5000)) + b"\r\n", 431, "32768"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\x07" * 500, 400, "this is TLS, .* http://"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400, "this is TLS"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "this is HTTP/2.0, and the server speaks HTTP/1.1"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400, "not HTTP/1.1: illegal request line"),
        (b"\x05\x01\x00", 400, "not HTTP/1.1: illegal request line"),
        (b"\r\n\r\n\0\0\r\n\r\n", 400, "not HTTP/1.1"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400, "Content-Length"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n", 400, "Length"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: x\r\n\r\n", 501, "Transfer-Encoding"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "not HTTP/1.1: "),
    ],
)
@pytest.mark.parametrize("piece", [1 << 20, 999])
def test_what_is_no_http(plain: Running, request_bytes: bytes, status: int, said: str, piece: int):
    """The same answer, read to its end, however the bytes arrive."""
    with socket.create_connection(("127.0.0.1", plain.port)) as client:
        client.settimeout(5)
        for begin in range(0, len(request_bytes), piece):
            client.sendall(request_bytes[begin : begin + piece])
        head, _, body = read_answer(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        assert re.search(said, json.loads(body)["error"]["message"])
    assert httpx.get(plain.url + "/health").status_code == 200


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running(FakeEngine()) as server:
        yield server


def read_answer(client: socket.socket) -> bytes:
    """An answer that is an error, to the end of its body."""
    answer = b""
    while not answer.endswith(b"}}") and (data := client.recv(4096)):
        answer += data
    return answer


def test_refusals_of_the_connection_are_counted_and_logged(capfd: pytest.CaptureFixture[str]):
    log_to_stderr("info")
    with running(FakeEngine()) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            read_answer(client)
        assert 'afs_http_requests_total{path="other",status="400"} 1.0' in httpx.get(server.url + "/metrics").text
    logging.getLogger("engine").handlers.clear()
    (line,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "refused" in line]
    assert line["status"] == 400 and line["client"] == "127.0.0.1" and "request line" in line["why"]


def test_answers_are_counted_under_their_path(impatient: None):
    """Those too that no route has seen."""
    begun = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{"
    with running(FakeEngine(), max_body=1000, api_key="k") as server, httpx.Client(base_url=server.url) as client:
        key = {"Authorization": "Bearer k"}
        client.post("/v1/completions", json={"prompt": "x" * 2000}, headers=key)
        client.post("/tokenize", json={"prompt": "x"})
        client.get("/v1/models/a/b", headers=key | {"A": "a" * 33_000})
        client.get("/nowhere")
        with_key = begun.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer k")
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(with_key)
            time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(with_key)
            assert read_answer(slow).startswith(b"HTTP/1.1 408 Request Timeout")
        wanted = [("/v1/completions", 413), ("/tokenize", 401), ("/v1/models/{name:path}", 431), ("other", 401),
                  ("/v1/completions", 499), ("/v1/completions", 408)]  # fmt: skip
        text = client.get("/metrics").text
        for path, status in wanted:
            assert f'afs_http_requests_total{{path="{path}",status="{status}"}} 1.0' in text, (path, status)


def test_a_request_of_which_a_head_is_asked_may_be_slow_too(impatient: None, plain: Running):
    with socket.create_connection(("127.0.0.1", plain.port)) as client:
        client.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        client.settimeout(5)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.server.middleware.BODIES", 3)
    begun = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 90_000
    with running(FakeEngine(), max_body=100_000) as server, httpx.Client(base_url=server.url) as client:
        many = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for one in many:
            one.sendall(begun)
        small = {"prompt": "x", "max_tokens": 1}
        assert client.post("/v1/completions", json=small).status_code == 200
        large = small | {"user": "u" * 90_000}
        eventually(lambda: client.post("/v1/completions", json=large).status_code == 429)
        for one in many:
            one.close()
        eventually(lambda: client.post("/v1/completions", json=large).status_code == 400)


def test_the_memory_of_a_large_body_is_given_back(monkeypatch: pytest.MonkeyPatch):
    trimmed: list[int] = []
    monkeypatch.setattr("engine.server.middleware.trim", lambda: trimmed.append(1))
    with running(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        for _ in range(3):
            client.post("/detokenize", json={"tokens": [10] * 400_000})
        eventually(lambda: len(trimmed) == 1)  # once for all that end together
    middleware.trim()


# --- connections ------------------------------------------------------------------------------------------------------


def connect(server: Running, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(count)]


@pytest.mark.parametrize("sent", [b"", b"GET /he", b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"])
def test_connections_that_wait_give_way(sent: bytes, capfd: pytest.CaptureFixture[str]):
    log_to_stderr("warning")
    with running(FakeEngine(), max_connections=20, grace=0.1) as server:
        waiting: list[socket.socket] = []
        for _ in range(60):
            waiting += connect(server, 1)
            waiting[-1].sendall(sent)
        for _ in range(3):
            assert httpx.get(server.url + "/health").status_code == 200
        eventually(lambda: len(server.server.server_state.connections) <= 20)
        # Those that came first have gone.
        for one in waiting[:40]:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1000)[:12] in (b"", b"HTTP/1.1 503")
        waiting[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            waiting[-1].recv(1)
        for one in waiting:
            one.close()
    logging.getLogger("engine").handlers.clear()
    said = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]
    assert said == ["no room for more connections: those that wait are closed"]  # once


def test_connections_that_are_being_answered_do_not_give_way():
    engine = FakeEngine(delay=0.03)
    with running(engine, max_connections=5, grace=0.1) as server:
        busy = connect(server, 5)
        for one in busy:
            one.sendall(message({**BODY, "stream": True}))
        eventually(lambda: len(engine.streams) == 5)
        (late,) = connect(server, 1)
        assert late.recv(1000).startswith(b"HTTP/1.1 503 Service Unavailable")
        assert not any(stream.aborted for stream in engine.streams)
        busy[0].close()
        eventually(lambda: len(server.server.server_state.connections) < 5)
        assert httpx.get(server.url + "/health").status_code == 200
        for one in (*busy, late):
            one.close()


def test_kept_connections_are_closed_in_their_time():
    with running(FakeEngine(), keep_alive=0.3) as server, socket.create_connection(("127.0.0.1", server.port)) as kept:
        kept.settimeout(5)
        for _ in range(2):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.1)
        begin = time.monotonic()
        assert kept.recv(1000) == b"" and time.monotonic() - begin < 2


def test_kept_connections_are_no_slow_ones(impatient: None, plain: Running):
    with socket.create_connection(("127.0.0.1", plain.port)) as kept:
        kept.settimeout(5)
        for _ in range(2):
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert kept.recv(1000).startswith(b"HTTP/1.1 200")
            time.sleep(0.5)


@pytest.mark.parametrize(
    ("soft", "hard", "expected"), [(1024, 1024, 1024), (1024, 1_000_000, None), (1024, -1, None), (256, 300, 300)]
)
def test_open_files(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int | None):
    """As many connections as the hard limit has room for, and always fewer than files."""
    limit = [soft, hard]
    monkeypatch.setattr(serving.resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(serving.resource, "setrlimit", lambda _, wanted: limit.__setitem__(0, wanted[0]))
    room = serving.room_for_connections()
    if expected is None:
        assert room == serving.MAX_CONNECTIONS and limit[0] > room
    else:
        assert limit == [expected, hard] and 16 <= room < expected - 2 * serving.ACCEPTED


def test_a_system_without_files_is_logged_once(capfd: pytest.CaptureFixture[str]):
    log_to_stderr("info")
    handle = serving._log_once_a_minute()
    loop = cast(Any, None)
    for _ in range(100):
        handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "files")})
    handle(loop, {"message": "another", "exception": KeyError("x")})
    logging.getLogger("engine").handlers.clear()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["no connection can be accepted", "another"]
    assert "KeyError" in lines[1]["traceback"]


def test_the_queue_is_bounded():
    engine = FakeEngine(delay=0.03, room=2)
    with running(engine, grace=0.2) as server, httpx.Client(base_url=server.url) as client:
        # all of a list or nothing of it
        answer = client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 2000})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error" and answer.json()["error"]["code"] == "queue_full"
        assert len(engine.streams) == 2 and all(s.aborted for s in engine.streams)
        assert client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2}).status_code == 200
        many = client.post("/v1/completions", json={"prompt": ["a"] * 2000, "max_tokens": 1})
        assert many.status_code == 400 and "at most 1024" in many.json()["error"]["message"]


def test_requests_in_flight_are_bounded():
    engine = FakeEngine(delay=0.05)
    # 1 that waits, 8 that run, 256 more
    with running(engine, grace=0.1, max_waiting=1) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(265)]
        for client in clients:
            client.sendall(message(BODY)[:-1])  # all but the end of the body
        with httpx.Client(base_url=server.url) as late:
            eventually(lambda: late.get("/v1/models").status_code == 429)
            assert late.get("/v1/models").headers["retry-after"] == "1"
            assert late.get("/health").status_code == late.get("/metrics").status_code == 200
            for client in clients:
                client.close()
            eventually(lambda: late.get("/v1/models").status_code == 200)


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_api_key():
    with running(FakeEngine(), api_key="s3cret") as server, httpx.Client(base_url=server.url) as client:
        body = {"prompt": "x", "max_tokens": 1}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}, {"Authorization": ""}):
            answer = client.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert "s3cret" not in answer.text
        for path in ("/v1/models", "/tokenizer_info", "/v1/nothing", "/tokenize"):
            assert client.get(path).status_code == 401
        for path in ("/", "/health", "/metrics", "/stats", "/openapi.json", "/version"):
            assert client.get(path).status_code == 200
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
            right = {"Authorization": f"{scheme} s3cret"}
            assert client.post("/v1/completions", json=body, headers=right).status_code == 200
        for given in ("Bearer", "Basic s3cret", "bearers3cret", "Bearer s3cret s3cret", "Bearer S3CRET"):
            assert client.get("/v1/models", headers={"Authorization": given}).status_code == 401
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
        wrong = client.get("/v1/models", headers={"Authorization": "Bearer no"})
        assert wrong.headers["www-authenticate"] == 'Bearer error="invalid_token"'


def test_allowed_hosts():
    names = ("api.example", "*.inner.example", "127.0.0.1", "::1")
    with running(FakeEngine(), allowed_hosts=names) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        for host in ("api.example", "API.example:8000", "api.example.", "a.inner.example", "[::1]:80"):
            assert client.get("/health", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "api.example.evil.example", "inner.example", "xapi.example", "localhost", ""):
            answer = client.get("/v1/models", headers={"Host": host})
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed", host
    with running(FakeEngine()) as server:
        assert httpx.get(server.url + "/health", headers={"Host": "anything"}).status_code == 200


def test_other_sites_may_ask_only_where_told():
    asking = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
    with running(FakeEngine()) as server:
        answer = httpx.options(server.url + "/v1/completions", headers=asking)
        assert "access-control-allow-origin" not in answer.headers
    with running(FakeEngine(), cors_origins=("http://app.example",), api_key="k") as server:
        answer = httpx.options(server.url + "/v1/completions", headers=asking)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://app.example"
        answer = httpx.post(server.url + "/v1/completions", headers={"Origin": "http://app.example"}, json={})
        assert answer.status_code == 401 and "access-control-allow-origin" in answer.headers


# --- the end ----------------------------------------------------------------------------------------------------------


def read_stream(server: Running, tokens: int) -> list[str]:
    body = {**BODY, "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=20) as answer:
        return [line.removeprefix("data: ") for line in answer.iter_lines() if line]


def test_streams_end_within_the_grace():
    engine = FakeEngine(delay=0.02)
    found: dict[int, list[str]] = {}
    with running(engine, grace=5.0) as server:
        threads = [threading.Thread(target=lambda n=n: found.__setitem__(n, read_stream(server, n))) for n in (30, 40)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(engine.streams) == 2)
        server.server.should_exit = True
        for thread in threads:
            thread.join(20)
    for tokens, lines in found.items():
        assert lines[-1] == "[DONE]" and json.loads(lines[-2])["choices"][0]["finish_reason"] == "length", tokens
    assert not any(s.aborted for s in engine.streams) and engine.left


def test_what_does_not_end_within_the_grace_gets_an_error():
    engine = FakeEngine(delay=0.02)
    found: list[Any] = []
    with running(engine, grace=0.3) as server:
        stream = threading.Thread(target=lambda: found.append(read_stream(server, 2000)))
        whole = threading.Thread(
            target=lambda: found.append(httpx.post(server.url + "/v1/completions", json=BODY, timeout=20))
        )
        for thread in (stream, whole):
            thread.start()
        eventually(lambda: len(engine.streams) == 2)
        kept = httpx.Client(base_url=server.url)
        assert kept.get("/health").status_code == 200
        # a connection that is busy when the end begins
        with socket.create_connection(("127.0.0.1", server.port)) as late:
            late.settimeout(5)
            whole_request = message({"prompt": "x"})
            late.sendall(whole_request[:-1])
            time.sleep(0.1)
            server.server.should_exit = True
            eventually(lambda: server.server.app.state.service.draining)
            late.sendall(whole_request[-1:])
            assert late.recv(1000).startswith(b"HTTP/1.1 503")
        for thread in (stream, whole):
            thread.join(20)
        kept.close()
    answer = next(item for item in found if isinstance(item, httpx.Response))
    lines = next(item for item in found if isinstance(item, list))
    assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]
    assert lines[-1] == "[DONE]" and "shutting down" in json.loads(lines[-2])["error"]["message"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_a_body_that_is_still_coming_does_not_hold_up_the_end(capfd: pytest.CaptureFixture[str]):
    log_to_stderr("info")
    with running(FakeEngine(), grace=20.0) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(5)
        client.sendall(message(BODY)[:-1])
        time.sleep(0.1)
        begin = time.monotonic()
        server.stop()
        assert time.monotonic() - begin < 3
        assert client.recv(1000).startswith(b"HTTP/1.1 503")
    logging.getLogger("engine").handlers.clear()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["shutting down", "broken off", "stopped"]
    assert lines[1]["status"] == 503


def test_while_it_drains_the_server_says_so():
    engine = FakeEngine(delay=0.02)
    with running(engine, grace=20.0) as server:
        found: list[list[str]] = []
        stream = threading.Thread(target=lambda: found.append(read_stream(server, 60)))
        stream.start()
        eventually(lambda: len(engine.streams) == 1)
        server.server.should_exit = True
        eventually(lambda: server.server.app.state.service.draining)
        for path in ("/health", "/v1/completions"):  # on connections of their own
            body = None if path == "/health" else BODY
            answer = httpx.request("POST" if body else "GET", server.url + path, json=body)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1", path
            assert answer.headers["connection"] == "close" and "shutting down" in answer.json()["error"]["message"]
        assert httpx.get(server.url + "/stats").json()["running"] == 1
        stream.join(20)
        assert json.loads(found[0][-2])["choices"][0]["finish_reason"] == "length"
        server.thread.join(10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


def test_a_second_signal_does_not_wait():
    engine = FakeEngine(delay=0.02)
    found: list[list[str]] = []
    with running(engine, grace=60.0) as server:
        thread = threading.Thread(target=lambda: found.append(read_stream(server, 2000)))
        thread.start()
        eventually(lambda: len(engine.streams) == 1)
        for _ in range(2):
            server.server.handle_exit(signal.SIGINT, None)
            time.sleep(0.2)
        thread.join(10)
    assert found[0][-1] == "[DONE]" and "shutting down" in found[0][-2]


PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import engine.server.serve as serving
from fake_engine import FakeEngine, fake_llm
serving.AsyncLLM = lambda llm, max_waiting: FakeEngine(delay=0.02)
serving.serve(fake_llm, serving.Settings(("m",)), port=0, grace=5)
print("after")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number: signal.Signals):
    script = PROCESS.format(tests=str(Path(__file__).parents[1]))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        first = json.loads(process.stderr.readline())
        assert first["message"] == "serving" and first["url"].startswith("http://127.0.0.1:")
        lines: list[str] = []
        with httpx.stream(
            "POST", first["url"] + "/v1/completions", json={**BODY, "max_tokens": 40, "stream": True}, timeout=20
        ) as answer:
            for line in answer.iter_lines():
                if not lines:
                    process.send_signal(number)
                lines.append(line)
        assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"
        stdout, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    logged = [json.loads(line)["message"] for line in stderr.splitlines()]
    assert logged == ["shutting down", "answered", "stopped"], stderr
    assert (process.returncode, stdout) == ((0, "after\n") if number == signal.SIGINT else (-signal.SIGTERM, ""))


def test_a_warning_where_anyone_may_ask(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "AsyncLLM", lambda llm, max_waiting: FakeEngine())
    frozen: list[int] = []
    monkeypatch.setattr(serving.Server, "run", lambda self, sockets: frozen.append(gc.get_freeze_count()))
    serving.serve(fake_llm, serving.Settings(("m",)), host="0.0.0.0", port=0)
    assert "no API key" in capfd.readouterr().err
    # Meanwhile the garbage collector leaves out what was there.
    assert frozen[0] > 1000 and not gc.get_freeze_count()
    serving.serve(fake_llm, serving.Settings(("m",), api_key="k"), host="0.0.0.0", port=0)
    serving.serve(fake_llm, serving.Settings(("m",)), host="localhost", port=0)
    assert "no API key" not in capfd.readouterr().err
    logging.getLogger("engine").handlers.clear()
