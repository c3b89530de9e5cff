"""The server over a stand-in for the engine: what goes in, what comes out, in OpenAI's and vLLM's shapes."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, cast

import httpx
import pytest
from fake_engine import REPLY, TINY, FakeEngine, Running, fake_llm, running, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from engine.errors import ContextLengthError, RequestError
from engine.runtime.request import Completion, Update
from engine.server.app import Settings, create_app
from engine.server.logs import JsonLines, TextLines, is_text, log_to_stderr
from engine.server.metrics import Metrics, token_buckets
from engine.server.middleware import MAX_VALUES
from engine.server.protocol import ChatRequest, CompletionRequest, refusal
from engine.server.serve import serve
from engine.server.tokens import TokenTexts
from engine.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]
REPLY_IDS = tokenizer().encode(REPLY)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine, request_timeout=9.0) as found:
        yield found
    assert engine.entered and engine.left


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as found:
        yield found


@pytest.fixture
def logs(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Reads what the server has logged so far, once the test has called log_to_stderr."""
    yield lambda: capfd.readouterr().err
    logging.getLogger("engine").handlers.clear()
    logging.getLogger("uvicorn").handlers.clear()


def completion(client: httpx.Client, prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(client: httpx.Client, messages: Any = None, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": messages or CHAT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream but its last one, [DONE]."""
    with client.stream("POST", path, json={"stream": True, **body}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(client: httpx.Client, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


# --- completions ------------------------------------------------------------------------------------------------------


def test_completion(client: httpx.Client):
    answer = completion(client, max_tokens=9, model="other")
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion" and answer["model"] == "other"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": tokenizer().decode(REPLY_IDS[:9]),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 9,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hello world", [tokenizer().encode("hello world")]),
        (["a b", "c"], [tokenizer().encode("a b"), tokenizer().encode("c")]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_kinds_of_prompt(client: httpx.Client, engine: FakeEngine, prompt: Any, ids: list[list[int]]):
    answer = completion(client, prompt, max_tokens=2)
    assert [stream.prompt_token_ids for stream in engine.streams[-len(ids) :]] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_defaults(client: httpx.Client, engine: FakeEngine):
    completion(client)
    params = engine.streams[-1].params
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k, params.n) == (16, 1, 1, 0, 1)
    assert (params.seed, params.logprobs, params.prompt_logprobs, params.stop) == (None, None, None, ())
    assert engine.streams[-1].asked | {"id": 0} == {"id": 0, "priority": 0, "timeout": 9.0, "session": None}
    completion(client, list(range(2040)))  # what nobody asked for makes room
    assert engine.streams[-1].params.max_new_tokens == 8
    chat(client)
    assert engine.streams[-1].params.max_new_tokens == 2048 - len(engine.streams[-1].prompt_token_ids)


def test_every_setting_arrives(client: httpx.Client, engine: FakeEngine):
    fields = {
        "max_tokens": 20, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "n": 2, "seed": 7,
        "stop": ["x", "y"], "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 3, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"17": -100, "4": 2.5}, "logprobs": 3,
        "echo": True, "priority": 4, "user": "ann", "best_of": 2, "store": True, "metadata": {"a": "b"}, "nonsense": 1,
    }  # fmt: skip
    completion(client, **fields)
    stream = engine.streams[-1]
    params = stream.params
    assert params.max_new_tokens == 20 and params.prompt_logprobs == 3 and params.stop == ("x", "y")
    assert dict(params.logit_bias) == {17: -100, 4: 2.5} and tuple(params.stop_token_ids) == (5,)
    same = ("temperature", "top_p", "top_k", "min_p", "n", "seed", "ignore_eos", "min_tokens", "frequency_penalty",
            "presence_penalty", "repetition_penalty", "logprobs")  # fmt: skip
    assert {name: getattr(params, name) for name in same} == {name: fields[name] for name in same}
    assert stream.asked["priority"] == 4 and stream.asked["session"] == "ann"
    completion(client, top_k=-1, seed=-1)
    assert engine.streams[-1].params.top_k == 0 and engine.streams[-1].params.seed is None
    completion(client, seed=-5)
    assert engine.streams[-1].params.seed == 2**63 - 5
    completion(client, **dict.fromkeys(fields))  # null is the default


def test_session_header_goes_before_user(client: httpx.Client, engine: FakeEngine):
    body = {"prompt": "x", "user": "ann", "max_tokens": 1}
    client.post("/v1/completions", json=body, headers={"X-Session-Id": "s1"})
    assert engine.streams[-1].asked["session"] == "s1"
    completion(client, **body | {"prompt_cache_key": "s2"})
    assert engine.streams[-1].asked["session"] == "s2"
    client.post("/v1/completions", json=body, headers={"X-Session-Id": ""})
    assert engine.streams[-1].asked["session"] == "ann"


def test_logprobs_and_echo(client: httpx.Client):
    (choice,) = completion(client, "hello world", max_tokens=6, logprobs=2, echo=True)["choices"]
    ids = tokenizer().encode("hello world") + REPLY_IDS[:6]
    written = choice["logprobs"]
    assert choice["text"] == "hello world" + tokenizer().decode(REPLY_IDS[:6])
    assert written["tokens"] == [TokenTexts(tokenizer()).text(token) for token in ids]
    assert written["token_logprobs"] == [None] + [-1.0] * (len(ids) - 1) and written["top_logprobs"][0] is None
    assert all(sorted(top.values()) == [-1.0, -0.5] for top in written["top_logprobs"][1:])
    for token, offset in zip(written["tokens"], written["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    # as lm-eval scores: nothing is generated
    (choice,) = completion(client, [1, 2, 3], max_tokens=0, logprobs=1, echo=True)["choices"]
    assert choice["text"] == tokenizer().decode([1, 2, 3]) and len(choice["logprobs"]["tokens"]) == 3
    # the chosen token's alone
    (choice,) = completion(client, max_tokens=1, logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"def": -1.0}]
    (choice,) = completion(client, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{REPLY_IDS[0]}"]


def test_return_token_ids(client: httpx.Client):
    (choice,) = completion(client, [1, 2], max_tokens=3, return_token_ids=True)["choices"]
    assert choice["token_ids"] == REPLY_IDS[:3] and choice["prompt_token_ids"] == [1, 2]
    answer = chat(client, max_tokens=3, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == REPLY_IDS[:3] and len(answer["prompt_token_ids"]) == 14


@pytest.mark.parametrize("prompt", ["hello", ["hello", "b c"]])
@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 1}])
def test_a_stream_is_the_whole_answer(client: httpx.Client, prompt: Any, fields: dict[str, Any]):
    body = {"prompt": prompt, "n": 2, "max_tokens": 18, "return_token_ids": True, **fields}
    whole = completion(client, **body)["choices"]
    pieces: dict[int, list[dict[str, Any]]] = {}
    for event in events(client, "/v1/completions", **body):
        (choice,) = event["choices"]
        pieces.setdefault(choice["index"], []).append(choice)
    assert sorted(pieces) == [choice["index"] for choice in whole]
    for choice in whole:
        parts = pieces[choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        if choice["logprobs"]:
            for name, values in choice["logprobs"].items():
                assert [value for part in parts for value in part["logprobs"][name]] == values


def test_stream_usage(client: httpx.Client):
    asked = {"prompt": "hello", "max_tokens": 3}
    *chunks, last = events(client, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3 and last["usage"]["total_tokens"] == 4
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(client, "/v1/completions", **asked, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert "usage" not in events(client, "/v1/completions", **asked)[0]


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat(client: httpx.Client, engine: FakeEngine):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": "go on", "name": "ann"},
    ]
    answer = chat(client, messages, max_tokens=9, max_completion_tokens=4)
    asked = [("system", "be brief"), ("user", "a\nb"), ("assistant", ""), ("user", "go on")]
    text = tokenizer().apply_chat_template([{"role": role, "content": content} for role, content in asked])
    assert engine.streams[-1].prompt_token_ids == tokenizer().encode(text, add_special_tokens=False)
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": tokenizer().decode(REPLY_IDS[:4]),
        "refusal": None,
    }
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None


def test_chat_logprobs(client: httpx.Client):
    (choice,) = chat(client, max_tokens=20, logprobs=True, top_logprobs=3)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 20 and all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert (
        bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="replace")
        == (choice["message"]["content"])
    )
    assert content[0]["token"] == "def" and content[0]["logprob"] == -1.0
    (choice,) = chat(client, max_tokens=1, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_chat_stream(client: httpx.Client):
    chunks = events(client, "/v1/chat/completions", messages=CHAT, max_tokens=20, n=2, logprobs=True, top_logprobs=1)
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[0]["finish_reason"] is None
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] == "length"
        assert all("content" in choice["delta"] for choice in own[1:-1])
        ids = (REPLY_IDS * 2)[index : index + 20]
        assert "".join(choice["delta"].get("content", "") for choice in own) == tokenizer().decode(ids)
        assert sum(len(choice["logprobs"]["content"]) for choice in own if choice["logprobs"]) == 20
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_chat_template_variables(engine: FakeEngine):
    other = Tokenizer(TINY)
    other.chat_template = "{{ messages[0].content }}{% if loud %}!{% endif %}{{ 1 + loud }}"
    with running(engine, fake_llm(tokenizer=other)) as server, httpx.Client(base_url=server.url) as client:
        chat(client, max_tokens=1, chat_template_kwargs={"loud": 1})
        assert engine.streams[-1].prompt_token_ids == tokenizer().encode("hi!2")
        body = {"messages": CHAT, "chat_template_kwargs": {"loud": "x"}}
        assert "chat template" in refused(client, "/v1/chat/completions", body)["message"]
        body = {"messages": CHAT, "chat_template_kwargs": {"messages": []}}
        assert refused(client, "/v1/chat/completions", body)["param"] == "chat_template_kwargs.messages"


def test_without_a_tokenizer():
    engine = FakeEngine(with_text=False)
    with running(engine, fake_llm(tokenizer=None)) as server, httpx.Client(base_url=server.url) as client:
        (choice,) = completion(client, [1, 2], max_tokens=3, logprobs=1)["choices"]
        assert choice["text"] == "" and choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in REPLY_IDS[:3]]
        assert len(events(client, "/v1/completions", prompt=[1], max_tokens=3)) == 3  # one a token all the same
        for path, body in {
            "/v1/completions": {"prompt": "text"},
            "/v1/chat/completions": {"messages": CHAT},
            "/tokenize": {"prompt": "text"},
            "/detokenize": {"tokens": [1]},
        }.items():
            assert "no tokenizer" in refused(client, path, body)["message"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": {}}, "prompt", "prompt must be a string, a list"),
        ({"prompt": []}, "prompt", "none of them empty"),
        ({"prompt": [[]]}, "prompt", "none of them empty"),
        ({"prompt": ["a", 1]}, "prompt", "prompt must be"),
        ({"prompt": [True]}, "prompt", "prompt must be"),
        ({"prompt": [-1]}, "prompt", "prompt must be"),
        ({"prompt": [5000]}, "prompt", "prompt holds token id 5000"),
        ({"prompt": "\ud800"}, "prompt", "unpaired surrogate"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens = -1: "),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens", "max_tokens = '5': "),
        ({"prompt": "x", "max_tokens": 2048}, "prompt", "1 tokens and 2048 tokens are to follow"),
        ({"prompt": list(range(2048))}, "prompt", "2048 tokens and at least 1 token"),
        ({"prompt": "x", "temperature": -0.1}, "temperature", "temperature = -0.1: "),
        ({"prompt": "x", "top_p": 0}, "top_p", "top_p = 0"),
        ({"prompt": "x", "n": 0}, "n", "n = 0: "),
        ({"prompt": "x", "n": 129}, "n", "n = 129: "),
        ({"prompt": "x", "stop": ""}, "stop", "stop must be"),
        ({"prompt": "x", "stop": ["a", ""]}, "stop", "stop must be"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "logprobs = 21: "),
        ({"prompt": "x", "logprobs": True}, "logprobs", "logprobs = True: "),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias.a", "logit_bias.a"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias.1", "logit_bias.1 = 101: "),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty", "presence_penalty = 3: "),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens", "min_tokens = 17"),
        ({"prompt": "x", "best_of": 2}, "best_of", "best_of = 2 is not served; it must be n = 1"),
        ({"prompt": "x", "suffix": "end"}, "suffix", "suffix is not served"),
        ({"prompt": "x", "guided_json": {}}, "guided_json", "guided_json is not served"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search", "leave it out, or give False"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
        ({"prompt": "x", "stream": 1}, "stream", "stream = 1: "),
        ({"prompt": "x", "logit_bias": {"a" * 5000: 1}}, "logit_bias." + "a" * 80, "logit_bias"),
        ({"prompt": "x", "user": "u" * 513}, "user", "at most 512"),
        ({"prompt": "x", "priority": -1}, "priority", "priority = -1"),
        ({}, "prompt", "prompt is missing"),
    ],
)
def test_completion_refusals(client: httpx.Client, fields: dict[str, Any], param: str | None, message: str):
    answer = client.post(
        "/v1/completions", content=json.dumps(fields).encode(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param or not message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [*CHAT, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": CHAT, "tool_choice": "required"}, "tool_choice"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": CHAT, "logprobs": 1}, "logprobs"),
        ({"messages": CHAT, "max_tokens": 0}, "max_tokens"),
        ({"messages": CHAT, "chat_template": "x"}, "chat_template"),
    ],
)
def test_chat_refusals(client: httpx.Client, fields: dict[str, Any], param: str):
    error = refused(client, "/v1/chat/completions", fields)
    assert error["param"] == param and param.rpartition(".")[2] in error["message"]


def test_harmless_fields_are_no_refusals(client: httpx.Client):
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    chat(client, max_tokens=1, **harmless)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"{" * 5000, b'{"a":' * 90000, b"1" * 5000, b'{"prompt": NaN}']
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_malformed_bodies(client: httpx.Client, path: str, body: bytes):
    for kind in ("application/json", "text/plain", None):
        answer = client.post(path, content=body, headers={"Content-Type": kind} if kind else {})
        assert answer.status_code == 400, (kind, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_statuses(client: httpx.Client):
    assert refused(client, "/v1/completions", {"prompt": "x", "model": "gpt"}, 404)["code"] == "model_not_found"
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    answer = client.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert answer.json()["error"]["code"] == "method_not_allowed"
    error = refused(client, "/v1/completions", {"prompt": [1] * 2000, "max_tokens": 49})
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "body", "counted"),
    [
        ("/v1/completions", {"prompt": [1] * 2000, "max_tokens": 49}, "2049"),
        ("/v1/completions", {"prompt": [1] * 2048}, "2049"),
        ("/v1/completions", {"prompt": [[1], [1] * 3000], "stream": True}, "3001"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello world " * 2000}]}, "2048"),
        ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 2048}, "2048"),
    ],
)
def test_clients_know_that_the_context_is_too_short(client: httpx.Client, path: str, body: Any, counted: str):
    error = refused(client, path, body)
    assert error["type"] == "invalid_request_error" and error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if "messages" in body else "prompt")
    # What litellm, LangChain and, over litellm, aider look for.
    assert re.search(r"This model's maximum context length is 2048 tokens", error["message"])
    assert "prompt is too long" in error["message"] and counted in error["message"]


def test_refusals_speak_of_the_apis_fields():
    body = CompletionRequest.model_validate({"prompt": "x", "max_tokens": 5, "min_tokens": 6})
    with pytest.raises(RequestError) as caught:
        body.params(5)
    error = refusal(caught.value, body).body["error"]
    assert error["param"] == "min_tokens" and error["message"].endswith("from 0 to max_tokens")
    talk = ChatRequest.model_validate({"messages": CHAT, "max_completion_tokens": 5})
    error = refusal(RequestError("max_new_tokens = 5 with prompt_logprobs", "max_new_tokens"), talk).body["error"]
    assert error == {
        "message": "max_completion_tokens = 5 with logprobs",
        "type": "invalid_request_error",
        "param": "max_completion_tokens",
        "code": "invalid_value",
    }
    error = refusal(ContextLengthError("too long"), talk).body["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


WRONG = {
    "ids": {"prompt": [*[1] * 50_000, "a"]},
    "floats": {"prompt": [0.5] * 50_000},
    "lists": {"prompt": [[1, "a"]] * 50_000},
    "bias": {"prompt": "x", "logit_bias": {f"a{i}": 1 for i in range(50_000)}},
    "biases": {"prompt": "x", "logit_bias": {str(i): 101 for i in range(50_000)}},
    "stop": {"prompt": "x", "stop": [1] * 50_000},
    "tokens": {"prompt": "x", "stop_token_ids": [-1] * 50_000},
    "messages": {"messages": [1] * 50_000},
    "parts": {"messages": [{"role": "user", "content": [1] * 50_000}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_of_many_wrong_values_the_first_ones_are_looked_at(name: str):
    """A body of 8 MiB of them took minutes and gigabytes, in which nothing else was answered."""
    kind = ChatRequest if "messages" in WRONG[name] else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(WRONG[name])
    assert caught.value.error_count() <= 64


def test_many_right_values(client: httpx.Client, engine: FakeEngine):
    bias = {str(token): -1.0 for token in range(3000)}
    completion(client, logit_bias=bias, stop_token_ids=list(range(4096)))
    assert len(engine.streams[-1].params.logit_bias) == 3000
    error = refused(client, "/v1/completions", {"prompt": "x", "stop_token_ids": [1] * 8193})
    assert error["param"] == "stop_token_ids" and error["code"] == "invalid_value"
    body = b'{"prompt": "' + b"," * (MAX_VALUES + 1) + b'"}'
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and str(MAX_VALUES) in answer.json()["error"]["message"]


@pytest.mark.parametrize("source", ["{% if %}", "{{ x | nofilter }}", "{% for m in messages %}", 5])
def test_a_broken_chat_template_is_refused_at_start(source: Any):
    broken = Tokenizer(TINY)
    broken.chat_template = source
    with pytest.raises(ValueError, match="chat template is broken: "):
        create_app(cast(Any, FakeEngine()), fake_llm(tokenizer=broken), Settings(("m",)))


def test_a_chat_template_may_refuse_a_message_alone(logs: Callable[[], str]):
    log_to_stderr("info")
    strict = Tokenizer(TINY)
    strict.chat_template = "{{ raise_exception('a system message must come first') }}"
    create_app(cast(Any, FakeEngine()), fake_llm(tokenizer=strict), Settings(("m",)))
    assert json.loads(logs())["why"] == "chat template: a system message must come first"


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("deadline", 504), ("abort", 503)])
def test_failures_of_the_engine(server: Running, reason: str, status: int):
    engine = FakeEngine()
    engine.failing = reason
    with running(engine) as failing, httpx.Client(base_url=failing.url) as client:
        error = refused(client, "/v1/completions", {"prompt": "x"}, status)
        assert error["type"] == "server_error" and (reason != "error" or "the model fell over" in error["message"])
        assert events(client, "/v1/chat/completions", messages=CHAT)[-1]["error"] == error
        # one of several prompts takes the others with it
        assert events(client, "/v1/completions", prompt=["a", "b"])[-1]["error"] == error


class Broken(FakeEngine):
    """Raises where nobody expects it."""

    async def submit(self, *args: Any, **kwargs: Any) -> Any:
        stream = await super().submit(*args, **kwargs)

        async def updates() -> AsyncIterator[Update]:
            yield Update(0, "some", [5], None, None)
            raise KeyError("a bug")

        stream._updates = updates()
        return stream


def test_a_bug_is_an_error_and_no_silence(logs: Callable[[], str]):
    log_to_stderr("info")
    engine = Broken()
    with running(engine) as server, httpx.Client(base_url=server.url) as client:
        assert "a bug" not in refused(client, "/v1/completions", {"prompt": "x"}, 500)["message"]
        chunks = events(client, "/v1/completions", prompt="x")
        assert chunks[0]["choices"][0]["text"] == "some" and chunks[-1]["error"]["code"] == "internal_error"
        assert all(stream.aborted for stream in engine.streams)
    tracebacks = [line for line in logs().splitlines() if "traceback" in line]
    assert len(tracebacks) == 2 and all("a bug" in json.loads(line)["traceback"] for line in tracebacks)


def test_a_dead_engine_ends_the_server(logs: Callable[[], str]):
    log_to_stderr("info")
    engine = FakeEngine(delay=0.02)
    with running(engine) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        body = {"prompt": "x", "max_tokens": 2000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.failure = KeyError("a fault")
            assert client.get("/health").status_code in (503, 200)  # the engine may not have been asked yet
            rest = [line for line in lines if line]
        assert "the engine has failed" in rest[-2] and rest[-1] == "data: [DONE]"
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert "a fault" in logs()


# --- the other routes -------------------------------------------------------------------------------------------------


def test_models(client: httpx.Client):
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "other"]
    assert all(card["object"] == "model" and card["max_model_len"] == 2048 for card in cards)
    assert client.get("/v1/models/other").json() == cards[1]


def test_tokenize(client: httpx.Client):
    text = "naïve 日本"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    ids = tokenizer().encode(text)
    assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == 2048
    assert len(answer["token_strs"]) == len(ids)
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    answer = client.post("/tokenize", json={"messages": CHAT}).json()
    expected = tokenizer().apply_chat_template(CHAT)
    assert answer["tokens"] == tokenizer().encode(expected, add_special_tokens=False) and answer["token_strs"] is None
    refused(client, "/tokenize", {})
    refused(client, "/tokenize", {"prompt": "a", "messages": CHAT})
    refused(client, "/detokenize", {"tokens": ["a"]})
    error = refused(client, "/detokenize", {"tokens": [1, 4096]})  # as completions refuse it
    assert error["param"] == "tokens" and error["code"] == "invalid_value"
    assert error["message"] == "tokens holds token id 4096; ids are 0 to 4095"
    assert client.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"


def test_health_version_stats(client: httpx.Client):
    assert client.get("/health").status_code == 200
    assert client.get("/version").json()["version"]
    stats = client.get("/stats").json()
    assert stats["max_batch"] == 8 and stats["pages"] == 100 and stats["model"] == "tiny" and stats["chat"] is True


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/stats", "/version", "/v1/models", "/docs", "/nothing"])
def test_head_is_get_without_a_body(client: httpx.Client, path: str):
    got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code and head.content == b""
    assert head.headers["content-type" if path != "/health" else "date"]
    if path not in ("/metrics", "/stats"):  # which change
        assert head.headers["content-length"] == got.headers["content-length"]


def test_head_of_what_is_no_get(client: httpx.Client):
    answer = client.head("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST" and answer.content == b""


def test_page(client: httpx.Client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "'unsafe" not in policy and policy.count("'sha256-") == 2
    assert "http://" not in answer.text and "https://" not in answer.text


def test_openapi(client: httpx.Client):
    document = client.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= set(document["paths"])
    assert "application/json" in document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]


def test_request_ids(client: httpx.Client):
    assert client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/nothing", headers={"X-Request-Id": "mine 1"}).headers["x-request-id"] != "mine 1"
    made = {client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


# --- metrics ----------------------------------------------------------------------------------------------------------


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and what tells samples of the same name apart."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, ",".join(labels.values())] = sample.value
    return found


def test_metrics_have_both_names():
    with running(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        completion(client, ["a", "b"], max_tokens=5, n=2)
        client.get("/nowhere")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'vllm:num_requests_running{engine="0",model_name="tiny"}' in answer.text
    found = samples(answer.text)
    pairs = {
        "afs_requests_running": "vllm:num_requests_running",
        "afs_requests_waiting": "vllm:num_requests_waiting",
        "afs_kv_cache_usage": "vllm:kv_cache_usage_perc",
        "afs_prompt_tokens_total": "vllm:prompt_tokens_total",
        "afs_generation_tokens_total": "vllm:generation_tokens_total",
        "afs_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
        "afs_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
        "afs_preemptions_total": "vllm:num_preemptions_total",
        "afs_time_to_first_token_seconds_count": "vllm:time_to_first_token_seconds_count",
        "afs_inter_token_latency_seconds_sum": "vllm:time_per_output_token_seconds_sum",
        "afs_e2e_request_latency_seconds_count": "vllm:e2e_request_latency_seconds_count",
    }
    for ours, theirs in pairs.items():
        assert found[ours, ""] == found[theirs, ""]
    assert found["vllm:gpu_cache_usage_perc", ""] == 0.25 and found["vllm:prefix_cache_hits_total", ""] == 20
    assert found["afs_requests_finished_total", "length"] == found["vllm:request_success_total", "length"] == 4
    assert found["vllm:time_to_first_token_seconds_count", ""] == 4  # completions
    assert found["vllm:time_to_first_token_seconds_bucket", "0.02"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", "0.04"] == 4
    assert found["vllm:inter_token_latency_seconds_count", ""] == 16
    assert found["vllm:request_time_per_output_token_seconds_sum", ""] == pytest.approx(4 * 0.02)
    assert found["vllm:request_generation_tokens_sum", ""] == 20 and found["vllm:request_params_n_sum", ""] == 4
    assert found["afs_http_requests_total", "/v1/completions,200"] == 1
    assert found["afs_http_requests_total", "other,404"] == 1
    assert not any(name.endswith("_created") for name, _ in found)


def test_a_completion_that_was_cut_short_is_in_no_histogram():
    metrics = Metrics(FakeEngine().stats, "m", 100)
    cut = Completion([1], [2, 3], "", "abort", 1.0, [1.0], 2.0)
    metrics.observe(cut)
    assert samples(metrics.render().decode())["vllm:e2e_request_latency_seconds_count", ""] == 0


def test_token_buckets():
    assert token_buckets(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_buckets(1) == (1,) and token_buckets(2048)[-1] == 2000
    for most in (9, 10, 99, 999, 1000, 4096):
        assert token_buckets(most)[-1] <= most < token_buckets(most * 10)[-1]


# --- tokens, settings, logs -------------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_of_tokens_are_those_of_the_text(text: str):
    texts = TokenTexts(tokenizer())
    ids = tokenizer().encode(text)
    assert bytes(byte for token in ids for byte in texts.bytes(token)) == text.encode()
    assert all(texts.text(token) for token in ids)


def test_every_token_has_bytes():
    texts = TokenTexts(tokenizer())
    for token in range(tokenizer().vocab_size):
        assert texts.bytes(token)
        assert not texts.text(token).startswith("bytes:") or "\ufffd" in tokenizer().decode([token])
    assert texts.bytes(5000) == [] and texts.text(5000) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ()}, "models = "),
        ({"models": ("a", "")}, "models = "),
        ({"api_key": ""}, "api_key must be"),
        ({"api_key": "two words"}, "api_key must be"),
        ({"max_waiting": 0}, "max_waiting = 0"),
        ({"max_body": 0}, "max_body = 0"),
        ({"keep_alive": 0}, "keep_alive = 0"),
        ({"allowed_hosts": ("a", "")}, "allowed_hosts holds ''"),
        ({"allowed_hosts": ("http://a",)}, "allowed_hosts holds 'http://a'"),
        ({"allowed_hosts": ("a.*",)}, "allowed_hosts holds 'a.*'"),
        ({"request_timeout": 0}, "request_timeout = 0"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Settings(**{"models": ("m",), **fields})


def test_serve_says_what_is_wrong():
    with pytest.raises(ValueError, match="grace = -1"):
        serve(fake_llm, Settings(("m",)), grace=-1)
    with pytest.raises(ValueError, match="log_level = 'loud'"):
        serve(fake_llm, Settings(("m",)), log_level="loud")
    with pytest.raises(ValueError, match="log_format = 'xml'; it must be one of auto, json, text"):
        serve(fake_llm, Settings(("m",)), log_format="xml")
    with pytest.raises(OSError):
        serve(fake_llm, Settings(("m",)), host="192.0.2.1", port=1)


def test_logs_are_json_lines_without_prompts(logs: Callable[[], str]):
    log_to_stderr("info")
    with running(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        body = {"prompt": "a secret", "max_tokens": 2}
        client.post("/v1/completions", json=body, headers={"X-Request-Id": "r-1"})
        client.post("/v1/completions", json={"prompt": "a secret", "model": "secret"})
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200
    lines = [json.loads(line) for line in logs().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "r-1"]
    assert line["status"] == 200 and line["path"] == "/v1/completions" and line["finished"] == ["length"]
    assert line["prompt_tokens"] == len(tokenizer().encode("a secret")) and line["generated_tokens"] == 2
    assert line["id"].startswith("cmpl-") and line["ms"] > 0 and line["client"] == "127.0.0.1"
    assert not any("secret" in json.dumps(line) for line in lines)
    assert {line["path"] for line in lines if "path" in line} == {"/v1/completions"}  # nor those that poll
    with running(FakeEngine(), log_prompts=True) as server, httpx.Client(base_url=server.url) as client:
        completion(client, "a secret", max_tokens=2)
    assert '"prompts": ["a secret"]' in logs()


def test_a_log_line_of_an_exception():
    try:
        raise KeyError("x")
    except KeyError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "broke %s", ("it",), sys.exc_info())
    line = json.loads(JsonLines().format(record))
    assert line["message"] == "broke it" and line["level"] == "error" and "KeyError: 'x'" in line["traceback"]


def test_a_prompt_too_long_by_its_bytes_is_not_encoded(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer(), "encode", lambda *_, **__: pytest.fail("encoded"))
    text = "word " * 10**6
    for path, body, param in (
        ("completions", {"prompt": text}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
    ):
        answer = client.post(f"/v1/{path}", json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "prompt is too long" in error["message"]
        assert "This model's maximum context length is 2048 tokens" in error["message"]


def test_tokenize_counts_what_is_too_long_for_the_model(client: httpx.Client):
    answer = client.post("/tokenize", json={"prompt": "def " * 5000}).json()
    assert answer["count"] == len(tokenizer().encode("def " * 5000)) > 2048


def test_lines_for_people(logs: Callable[[], str]):
    log_to_stderr("info", "text")
    with running(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        completion(client, "hello", max_tokens=2)
        client.get("/\x1b[31m\x07nowhere".encode("unicode_escape").decode().replace("\\x", "%"))
    lines = logs().splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d answered POST /v1/completions 200 in \d+ ms, 1 \+ 2 tokens, id cmpl-\w+, finished length",
        lines[0],
    )
    assert "GET /\\x1b[31m\\x07nowhere 404" in lines[1]


def test_a_line_for_people_of_an_exception():
    try:
        raise KeyError("x")
    except KeyError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "broke %s", ("it",), sys.exc_info())
    record.host = "h"
    first, *rest = TextLines().format(record).splitlines()
    assert first.endswith(" ERROR: broke it, host h") and rest[-1] == "KeyError: 'x'"


def test_lines_are_json_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    assert not is_text("auto") and is_text("text") and not is_text("json")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert is_text("auto") and not is_text("json")


def test_what_is_served_is_shown(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The address, what runs and where, and the limits: a table for people, one line of JSON for all else."""
    import engine.server.serve as serving

    monkeypatch.setattr(serving, "AsyncLLM", lambda llm, max_waiting: FakeEngine())
    monkeypatch.setattr(serving.Server, "run", lambda self, sockets: self._announce())
    try:
        serving.serve(fake_llm, Settings(("m",)), port=0, log_format="text")
        shown = " ".join(capfd.readouterr().err.split())
        assert "model m: Olmo2ForCausalLM, 7.2 M parameters" in shown and "API http://127.0.0.1:" in shown
        assert "cpu, bfloat16, backend reference" in shown and "KV cache 1,600 tokens" in shown
        assert "1,024 requests that wait" in shown and "bodies of 8 MiB" in shown
        serving.serve(fake_llm, Settings(("m",)), port=0)
        line = json.loads(capfd.readouterr().err)
    finally:
        logging.getLogger("engine").handlers.clear()
    assert line["message"] == "serving" and line["models"] == ["m"] and line["kv_tokens"] == 1600
    assert line["url"].startswith("http://127.0.0.1:") and line["max_connections"] > 100 and line["dtype"] == "bfloat16"
