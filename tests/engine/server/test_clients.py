"""Real clients against the server with the real engine and the bundled model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from fake_engine import TINY, Running, eventually, running, tokenizer

from engine.async_llm import AsyncLLM
from engine.llm import LLM, EngineConfig
from engine.runtime.request import Completion
from engine.sampling_params import SamplingParams

PROMPTS = [
    entry if isinstance(entry, str) else entry["prompt"] for entry in json.loads((TINY / "prompts.json").read_text())
]
CHAT: Any = [{"role": "user", "content": "What does os.path.join do?"}]


def load() -> LLM:
    return LLM(TINY, EngineConfig(kv_cache="paged", max_batch=64, max_model_len=512))


@pytest.fixture(scope="module")
def offline() -> LLM:
    return load()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    llm = load()
    with running(AsyncLLM(llm), llm, grace=5.0) as found:
        yield found


def expected(offline: LLM, prompt: str | list[int], **params: Any) -> list[Completion]:
    listed: Any = [prompt]
    return offline.generate(listed, SamplingParams(**params))


# --- the openai package -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai(server: Running) -> Iterator[Any]:
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_completions(openai: Any, offline: LLM):
    answer = openai.completions.create(model="tiny", prompt="def main(", max_tokens=12, temperature=0, n=2, logprobs=2)
    (one, two) = expected(offline, "def main(", max_new_tokens=12, temperature=0, n=2, logprobs=2)
    assert [choice.text for choice in answer.choices] == [one.text, two.text]
    assert answer.choices[0].finish_reason == one.finish_reason and answer.usage.completion_tokens == 24
    assert one.logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx([entry.logprob for entry in one.logprobs])
    assert all(len(top) in (2, 3) for top in answer.choices[0].logprobs.top_logprobs)


def test_openai_chat(openai: Any, offline: LLM):
    answer = openai.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=10, seed=5, logprobs=True, top_logprobs=3
    )
    ids = tokenizer().encode(tokenizer().apply_chat_template(CHAT), add_special_tokens=False)
    (done,) = expected(offline, ids, max_new_tokens=10, seed=5, logprobs=3)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == done.text
    assert len(choice.logprobs.content) == len(done.token_ids)
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_openai_streams(openai: Any, offline: LLM):
    fields = {"model": "tiny", "max_tokens": 20, "temperature": 0.8, "seed": 3, "stream": True}
    chunks = list(openai.completions.create(prompt="import ", stream_options={"include_usage": True}, **fields))
    (done,) = expected(offline, "import ", max_new_tokens=20, temperature=0.8, seed=3)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == done.text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(done.token_ids)
    chunks = list(openai.chat.completions.create(messages=CHAT, **fields))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    ids = tokenizer().encode(tokenizer().apply_chat_template(CHAT), add_special_tokens=False)
    (done,) = expected(offline, ids, max_new_tokens=20, temperature=0.8, seed=3)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == done.text


def test_openai_async(server: Running, offline: LLM):
    module = pytest.importorskip("openai")

    async def main() -> list[str]:
        async with module.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=16, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, PROMPTS[:8]))

    whole = offline.generate(PROMPTS[:8], SamplingParams(max_new_tokens=16, temperature=0))
    assert asyncio.run(main()) == [done.text for done in whole]


def test_openai_errors(openai: Any):
    module = pytest.importorskip("openai")
    with pytest.raises(module.NotFoundError) as missing:
        openai.completions.create(model="gpt", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(module.BadRequestError, match="temperature = -1"):
        openai.completions.create(model="tiny", prompt="x", temperature=-1)
    assert [model.id for model in openai.models.list()] == ["tiny", "other"]


# --- settings that the engine sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["\n", "("]},
        {"stop_token_ids": list(range(0, 4096, 3))},
        {"logit_bias": {"17": 100}},
        {"frequency_penalty": 1.5, "presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"min_p": 0.2, "top_k": 5, "top_p": 0.5, "temperature": 1.5},
        {"ignore_eos": True, "min_tokens": 24},
        {"n": 3, "temperature": 1.0},
        {"seed": 2**63 - 1, "n": 2, "temperature": 1.0},
    ],
)
def test_settings_give_what_they_give_offline(server: Running, offline: LLM, fields: dict[str, Any]):
    fields = {"temperature": 0, "seed": 11, **fields}
    answer = httpx.post(
        server.url + "/v1/completions", json={"prompt": "class A", "max_tokens": 24, **fields}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    whole = expected(offline, "class A", max_new_tokens=24, **fields)
    choices = answer.json()["choices"]
    assert [choice["text"] for choice in choices] == [done.text for done in whole]
    assert [choice["finish_reason"] for choice in choices] == [done.finish_reason for done in whole]
    assert [choice["stop_reason"] for choice in choices] == [done.stop for done in whole]


# --- curl, lm-eval ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server: Running, offline: LLM):
    def curl(*args: str) -> str:
        done = subprocess.run(["curl", "-sS", "-N", *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    body = {"prompt": "def main(", "max_tokens": 8, "temperature": 0, "stream": True}
    kind = ("-H", "Content-Type: application/json")
    lines = curl(server.url + "/v1/completions", *kind, "-d", json.dumps(body)).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    (done,) = expected(offline, "def main(", max_new_tokens=8, temperature=0)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == done.text
    answer = json.loads(curl(server.url + "/v1/completions", "-d", json.dumps(body)))
    assert "Content-Type: application/json" in answer["error"]["message"]


def test_scoring_as_lm_eval_does(server: Running, offline: LLM):
    """Its request for a context and its continuation, read as it reads it: one token is generated and dropped."""
    text = (TINY / "heldout.txt").read_text()
    sequences = [tokenizer().encode(text[begin : begin + 200]) for begin in (0, 5000, 9000)]
    body = {
        "model": "tiny",
        "prompt": sequences,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()
    params = SamplingParams(max_new_tokens=1, temperature=0, prompt_logprobs=1)
    for choice, done in zip(answer["choices"], offline.generate(sequences, params), strict=True):
        written = choice["logprobs"]
        scored = done.prompt_logprobs
        assert scored is not None and len(written["token_logprobs"]) == len(scored) + 1
        assert written["token_logprobs"][1:-1] == [entry.logprob for entry in scored[1:] if entry]
        for place, entry in enumerate(scored[1:], start=1):
            assert entry is not None
            greedy = written["token_logprobs"][place] == max(written["top_logprobs"][place].values())
            assert greedy == (entry.rank == 1)


@pytest.mark.slow
def test_lm_eval(server: Running, tmp_path: Any):
    """A task over bundled text, with lm-eval's own client: bits per byte as the model's page has it."""
    lm_eval = pytest.importorskip("lm_eval")
    text = (TINY / "heldout.txt").read_text()
    data = tmp_path / "text.jsonl"
    pieces = [text[begin : begin + 600] for begin in range(0, 12_000, 600)]
    data.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces))
    task = {
        "task": "bundled",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": server.url + "/v1/completions",
            "model": "tiny",
            "tokenizer_backend": "remote",
            "max_length": 512,
            "batch_size": 4,
        },
        tasks=[task],
        bootstrap_iters=0,
    )
    bits = found["results"]["bundled"]["bits_per_byte,none"]
    assert 0.5 < bits < 1.5


# --- many clients -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_streams_equal_offline_generation(server: Running, offline: LLM):
    """64 at a time, greedy and sampled, prompts of all lengths."""
    prompts = [(PROMPTS[i % len(PROMPTS)])[: 20 + 3 * i] for i in range(64)]
    params = [SamplingParams(max_new_tokens=4 + i % 9, temperature=i % 2, seed=i) for i in range(64)]
    whole = offline.generate(prompts, params)

    async def main() -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

            async def one(prompt: str, asked: SamplingParams) -> tuple[str, str]:
                body = {
                    "prompt": prompt,
                    "max_tokens": asked.max_new_tokens,
                    "temperature": asked.temperature,
                    "seed": asked.seed,
                    "stream": True,
                }
                text, reason = "", ""
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    async for line in answer.aiter_lines():
                        if line and line != "data: [DONE]":
                            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                            text += choice["text"]
                            reason = choice["finish_reason"] or reason
                return text, reason

            return await asyncio.gather(*(one(p, a) for p, a in zip(prompts, params, strict=True)))

    assert asyncio.run(main()) == [(done.text, done.finish_reason) for done in whole]


def test_leaving_frees_pages(server: Running):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"prompt": PROMPTS[0][:100], "max_tokens": 400, "ignore_eos": True, "n": 4, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            assert client.get("/stats").json()["pages_used"] > 0
        eventually(lambda: client.get("/stats").json()["running"] == 0, 10)
        assert client.get("/stats").json()["pages_used"] == 0
        aborted = [line for line in client.get("/metrics").text.splitlines() if 'finished_reason="abort"' in line]
        assert float(aborted[0].split()[-1]) >= 4


def test_queue_of_the_engine():
    llm = load()
    with running(AsyncLLM(llm, max_waiting=2), llm, max_waiting=2, grace=0.1) as server:
        body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}

        async def main() -> list[int]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                answers = await asyncio.gather(
                    *(client.post("/v1/completions", json=body | {"max_tokens": 30}) for _ in range(60))
                )
                assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 429)
                return [answer.status_code for answer in answers]

        statuses = asyncio.run(main())
        assert set(statuses) == {200, 429}
        answer = httpx.post(server.url + "/v1/completions", json={**body, "n": 3})
        assert answer.status_code == 400


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_soak(server: Running):
    """Many requests, a tenth of which leave early: no error, and memory does not grow with them.

    AFS_SOAK=1 makes them 10,000, five minutes of two cores.
    """
    count = 10_000 if "AFS_SOAK" in os.environ else 1000
    process = psutil.Process()

    async def some(client: httpx.AsyncClient, numbers: range) -> None:
        for number in numbers:
            body = {"prompt": [number % 4000, 7, 9], "max_tokens": 1 + number % 3, "stream": number % 2 == 0}
            if number % 10 == 0:
                async with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 300}):
                    continue
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text

    async def main() -> list[int]:
        sizes = []
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            for turn in range(10):
                begin, end = turn * count // 10, (turn + 1) * count // 10
                await asyncio.gather(*(some(client, range(begin + lane, end, 25)) for lane in range(25)))
                sizes.append(process.memory_info().rss)
        return sizes

    sizes = asyncio.run(main())
    eventually(lambda: httpx.get(server.url + "/stats").json()["running"] == 0, 30)
    assert httpx.get(server.url + "/stats").json()["pages_used"] == 0
    # The first fifth warms up what is kept (pools, caches, arenas).
    assert sizes[-1] - sizes[1] < 16 * 2**20, [size >> 20 for size in sizes]
