"""Requests from many tasks: the text of offline generation, errors to the one they concern, nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from engine_checkpoints import Reference

from engine.async_llm import AsyncLLM, Encoder, EngineDead, QueueFull, Stream
from engine.llm import LLM, EngineConfig
from engine.runtime.request import Completion, Update
from engine.sampling_params import SamplingParams

T = TypeVar("T")
LONG = SamplingParams(max_new_tokens=400, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def path(olmo2: Reference) -> Path:
    return olmo2.path


def make_llm(path: Path, **engine: Any) -> LLM:
    return LLM(path, EngineConfig(**{"kv_cache": "paged", "page_size": 8, "max_batch": 4, **engine}))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 120))


async def read(stream: Stream) -> tuple[list[Update], list[Completion]]:
    updates = [update async for update in stream]
    return updates, [update.completion for update in updates if update.completion]


def test_token_ids_are_submitted_at_once(path: Path):
    """Before anybody else's turn: of many that come together the first is the engine's before the others are read."""

    async def work() -> None:
        async with AsyncLLM(make_llm(path)) as engine:
            with pytest.raises(StopIteration) as ended:
                engine.submit([5, 6], LONG).send(None)
            async with ended.value.value as stream:
                assert stream.prompt_token_ids == [5, 6]

    run(work())


def test_equals_offline_generation(path: Path):
    llm = make_llm(path, max_batch=3, kv_tokens=400)
    prompts = ["the quick", "def main", [5, 6, 7], "x", list(range(10, 40))] * 3
    params = [
        SamplingParams(
            max_new_tokens=5 + i, temperature=i % 2, seed=i, stop=["e"] if i % 5 == 0 else (), n=1 + (i == 4),
            logprobs=2 if i % 3 == 0 else None,
        )
        for i in range(len(prompts))
    ]  # fmt: skip

    async def work() -> list[tuple[list[Update], list[Completion]]]:
        async with AsyncLLM(llm) as engine:
            streams = [await engine.submit(prompt, setting) for prompt, setting in zip(prompts, params, strict=True)]
            return await asyncio.gather(*map(read, streams))

    found = run(work())
    expected = llm.generate(prompts, params)
    for (updates, done), setting in zip(found, params, strict=True):
        for completion in sorted(done, key=lambda c: c.index):
            right = expected.pop(0)
            mine = [u for u in updates if u.index == completion.index]
            assert (completion.token_ids, completion.text) == (right.token_ids, right.text)
            assert (completion.finish_reason, completion.stop) == (right.finish_reason, right.stop)
            assert completion.logprobs == right.logprobs
            assert "".join(u.text for u in mine) == right.text
            assert [t for u in mine for t in u.token_ids] == right.token_ids
            if setting.logprobs is not None:
                assert [entry for u in mine for entry in u.logprobs or []] == right.logprobs
    assert llm.core.pool.used == 0 and len(llm.core) == 0


def test_abort_deadline_and_what_is_refused(path: Path):
    llm = make_llm(path, max_batch=2, kv_tokens=900)

    async def work() -> None:
        async with AsyncLLM(llm, max_waiting=3) as engine:
            with pytest.raises(ValueError, match="the prompt is empty"):
                await engine.submit([])
            with pytest.raises(ValueError, match="the prompt has 200 tokens and max_new_tokens = 400"):
                await engine.submit([5] * 200, LONG)
            first = await engine.submit("the quick", LONG, id="a")
            with pytest.raises(ValueError, match="'a'"):
                await engine.submit("the quick", LONG, id="a")
            await anext(first)
            late = await engine.submit("def", LONG, timeout=0.0)
            assert (await read(late))[1][0].finish_reason == "deadline"
            async with await engine.submit("def", LONG) as second:
                await anext(second)
            assert (await read(second))[1][0].finish_reason == "abort"
            first.abort()
            first.abort()
            assert (await read(first))[1][0].finish_reason == "abort"
            running = [await engine.submit("x", LONG) for _ in range(2)]
            for stream in running:
                await anext(stream)
            waiting = [await engine.submit("x", LONG) for _ in range(3)]
            with pytest.raises(QueueFull, match="at most 3 may"):
                await engine.submit("x", LONG)
            assert engine.stats().waiting == 3
            for stream in [*running, *waiting]:
                stream.abort()
            for stream in [*running, *waiting]:
                await read(stream)
            again = await engine.submit("x", SamplingParams(max_new_tokens=2, ignore_eos=True), id="a")
            assert (await read(again))[1][0].finish_reason == "length"

    run(work())
    assert llm.core.pool.used == 0 and llm.stats().finished["abort"] == 7


def test_drain_ends_what_is_left(path: Path):
    llm = make_llm(path)

    async def work() -> tuple[Completion, Completion]:
        async with AsyncLLM(llm) as engine:
            short = await engine.submit("x", SamplingParams(max_new_tokens=2, ignore_eos=True))
            endless = await engine.submit("x", LONG)
            await anext(endless)
            drained = asyncio.create_task(engine.drain(0.3))
            await asyncio.sleep(0)
            with pytest.raises(EngineDead, match="shutting down"):
                await engine.submit("x")
            done = (await read(short))[1][0], (await read(endless))[1][0]
            await drained
            return done

    short, endless = run(work())
    assert (short.finish_reason, endless.finish_reason) == ("length", "abort")


def test_a_failure_reaches_every_stream(path: Path, monkeypatch: pytest.MonkeyPatch):
    llm = make_llm(path)

    async def work() -> None:
        async with AsyncLLM(llm) as engine:
            stream = await engine.submit("x", LONG)
            await anext(stream)
            monkeypatch.setattr(llm.core, "step", lambda: 1 / 0)
            with pytest.raises(EngineDead, match="ZeroDivisionError"):
                await read(stream)
            with pytest.raises(EngineDead, match="has failed"):
                await engine.submit("x")
            assert isinstance(engine.failure, ZeroDivisionError)

    run(work())
    with pytest.raises(EngineDead, match="was not started"):
        run(AsyncLLM(llm).submit("x"))
    with pytest.raises(ValueError, match="max_waiting = 0"):
        AsyncLLM(llm, 0)


def test_sessions_keep_their_pages(path: Path):
    llm = make_llm(path, max_batch=1, kv_tokens=160)
    params = SamplingParams(max_new_tokens=1, ignore_eos=True, temperature=0.0)
    prompts = {name: [start + i for i in range(48)] for name, start in (("a", 10), ("b", 100), ("c", 200), ("d", 300))}

    async def work() -> list[int]:
        async with AsyncLLM(llm) as engine:
            found = []
            # Room for three. a's other prompt makes a the one used last; d then takes the room of b.
            for name, prompt in (
                ("a", prompts["a"]), ("b", prompts["b"]), ("a", [9, *prompts["a"][:10]]), ("c", prompts["c"]),
                ("d", prompts["d"][:40]), ("a", prompts["a"]), ("b", prompts["b"]),
            ):  # fmt: skip
                done = (await read(await engine.submit(prompt, params, session=name)))[1][0]
                found.append(done.cached_tokens)
            return found

    found = run(work())
    assert found[:5] == [0] * 5 and found[5] == 40 and found[6] < 40


def test_short_texts_do_not_wait_for_long_ones():
    async def work() -> None:
        encoder, gate, order = Encoder(), threading.Event(), []

        def encode() -> bool:
            order.append("long")
            return gate.wait(30)

        long = [asyncio.create_task(encoder.run(2**20, encode)) for _ in "ab"]
        while not order:
            await asyncio.sleep(0.001)
        assert [await encoder.run(9, lambda: "short") for _ in range(5)] == ["short"] * 5
        assert order == ["long"]  # the second one waits for the first
        gate.set()
        assert all(await asyncio.gather(*long)) and order == ["long"] * 2
        encoder.shutdown()

    run(work())
