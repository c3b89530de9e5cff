"""Runs of requests: what is recorded of them, and the least time beside it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checkpoints import Reference

from engine.bench.throughput import (
    Limit,
    bench,
    check,
    follow_progress,
    measure,
    run_offline,
    run_online,
    split,
    warm_up,
)
from engine.bench.workloads import Mix, Outcome, SampleRequest, arrive, render
from engine.model.config import ModelConfig
from engine.model.cost import Ceilings, Footprint, step_cost
from engine.runtime.request import Completion, Update
from engine.sampling_params import SamplingParams

TINY = Path(__file__).resolve().parents[2] / "data/models/olmo2-tiny"
CEILINGS = Ceilings(bandwidth=1e9, matrix_rate=1e12)


@pytest.fixture(scope="module")
def config(olmo2: Reference) -> ModelConfig:
    return ModelConfig.from_file(olmo2.path)


# --- an engine that only says what it was asked -----------------------------------------------------------------------


class QueueFull(RuntimeError):
    pass


@dataclass
class Stats:
    generated_tokens: int = 0
    preemptions: int = 0
    late_kernels: int = 0
    late_graphs: int = 0


def complete(prompt: Sequence[int], params: SamplingParams, first: float = 5.0, gap: float = 1.0) -> Completion:
    gaps = [gap] * (params.max_new_tokens - 1)
    tokens = [0] * params.max_new_tokens
    return Completion(
        list(prompt), tokens, "", "length", first, gaps, first + sum(gaps), cached_tokens=len(prompt) // 2
    )


class FakeLLM:
    """Answers at once, with made-up times."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.max_model_len, self.tokenizer = config, config.max_position_embeddings, None
        self.engine = types.SimpleNamespace(device="cpu", max_batch=4)
        self.model = types.SimpleNamespace(footprint=Footprint.dense(config, torch.bfloat16))
        self.calls: list[list[tuple[list[int], SamplingParams]]] = []
        self._stats = Stats()

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        self.calls.append(list(zip(prompts, params, strict=True)))
        self._stats.preemptions += 3
        time.sleep(0.02)
        return [complete(*pair) for pair in self.calls[-1]]

    def stats(self) -> Stats:
        return Stats(self._stats.generated_tokens, self._stats.preemptions)


@dataclass
class FakeStream:
    completion: Completion
    arrival: float
    id: str = "a"
    left: bool = False

    async def __aenter__(self) -> FakeStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.left = True

    async def __aiter__(self):
        for token in self.completion.token_ids[:-1]:
            await asyncio.sleep(0)
            yield Update(0, "", [token], None, None)
        yield Update(0, "", self.completion.token_ids[-1:], None, self.completion)


@dataclass
class FakeAsync:
    """engine.async_llm.AsyncLLM as far as it is used."""

    llm: Any = None
    max_waiting: int = 0
    submitted: list[tuple[float, list[int], SamplingParams]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    ended: bool = False

    async def __aenter__(self) -> FakeAsync:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ended = True

    async def submit(self, prompt: list[int], params: SamplingParams) -> FakeStream:
        now = time.perf_counter()
        self.submitted.append((now, prompt, params))
        if prompt == [1]:
            raise QueueFull("1 waits, max_waiting = 0")
        if prompt == [2]:
            raise ValueError("prompt holds token id 2")
        made = complete(prompt, params)
        if prompt == [3]:
            made = replace(made, finish_reason="error", error="every logit is NaN")
        self.streams.append(FakeStream(made, now))
        return self.streams[-1]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("engine.async_llm")
    module.__dict__.update(AsyncLLM=FakeAsync, QueueFull=QueueFull)
    monkeypatch.setitem(sys.modules, "engine.async_llm", module)


# --- running ----------------------------------------------------------------------------------------------------------


def test_all_at_once_is_one_call(config: ModelConfig):
    llm: Any = FakeLLM(config)
    requests = Mix(6, 3, 9, 5).requests(config.vocab_size)
    result = measure(llm, requests, CEILINGS)
    ((*asked,),) = llm.calls
    assert [prompt for prompt, _ in asked] == [request.prompt for request in requests]
    assert {(p.max_new_tokens, p.temperature, p.ignore_eos) for _, p in asked} == {(5, 0.0, True)}
    record = result.record("inf", model="m")
    assert record["model"] == "m" and record["completed"] == 6 and record["new_tokens"] == 30
    assert record["preemptions"] == 3 and record["peak_memory_bytes"] is None
    assert record["ttft_ms_p50"] == 5 and record["tpot_ms_mean"] == 1 and record["e2e_ms_p99"] == 9
    assert record["cached_tokens"] == sum(len(r.prompt) // 2 for r in requests) > 0
    assert result.computed_tokens == record["prompt_tokens"] - record["cached_tokens"]
    assert record["output_throughput"] == pytest.approx(30 / result.seconds) and result.seconds >= 0.02
    assert record["floor_share"] == pytest.approx(record["floor_s"] / result.seconds)
    assert json.loads(json.dumps(record)) == record
    # Everyone's first token came at the same time.
    prompts, decode = record["phases"]
    assert (prompts["phase"], prompts["seconds"], prompts["new_tokens"]) == ("prompts", 0.005, 6)
    assert prompts["prompt_tokens"] == result.computed_tokens and decode["new_tokens"] == 24
    assert decode["seconds"] == pytest.approx(result.seconds - 0.005)


def test_requests_run_at_their_arrivals(config: ModelConfig, online: None):
    requests = arrive([SampleRequest([9, 9, index], 3) for index in range(4)], rate=25.0, kind="fixed")
    result = measure(FakeLLM(config), requests, CEILINGS)  # type: ignore[arg-type]
    begins = [outcome.begin for outcome in result.outcomes]
    assert begins == pytest.approx([0.0, 0.04, 0.08, 0.12], abs=0.03) and begins == sorted(begins)
    assert 0.12 <= result.seconds < 1.0
    assert (result.floor_s, result.phases) == (None, []), "the engine has waited: there is no least time"
    assert result.record("25/s")["floor_share"] is None


def test_no_request_waits_for_another(online: None):
    """Open loop: one that takes long does not move the next one's arrival."""

    class Slow(FakeAsync):
        async def submit(self, prompt: list[int], params: SamplingParams) -> FakeStream:
            stream = await super().submit(prompt, params)
            await asyncio.sleep(0.3 if len(self.submitted) == 1 else 0.0)
            return stream

    engine = Slow()
    requests = arrive([SampleRequest([9, index], 2) for index in range(3)], rate=50.0, kind="fixed")
    _, seconds = asyncio.run(run_online(engine, requests))  # type: ignore[arg-type]
    times = [at for at, _, _ in engine.submitted]
    assert times[-1] - times[0] < 0.2 and seconds >= 0.3
    assert all(stream.left for stream in engine.streams)


def test_failures_are_outcomes(online: None):
    engine = FakeAsync()
    outcomes, _ = asyncio.run(run_online(engine, [SampleRequest([1], 2), SampleRequest([3], 2), SampleRequest([4], 2)]))  # type: ignore[arg-type]
    found = [(outcome.error, outcome.detail) for outcome in outcomes]
    assert found == [("queue full", "1 waits, max_waiting = 0"), ("error", "every logit is NaN"), (None, "")]


def test_a_refused_request_ends_the_run(online: None):
    with pytest.raises(ValueError, match="token id 2"):
        asyncio.run(run_online(FakeAsync(), [SampleRequest([9], 2), SampleRequest([2], 2)]))  # type: ignore[arg-type]


def test_bench_warms_up_and_takes_other_requests_each_time(config: ModelConfig):
    llm: Any = FakeLLM(config)
    mix = Mix(3, 4, 8, 2)
    schedules = [("a", list[SampleRequest]), ("b", list[SampleRequest])]
    records = bench(llm, lambda run: mix.requests(config.vocab_size, run), schedules, CEILINGS, weights="random")
    assert [record["run"] for record in records] == ["a", "b"] and records[0]["weights"] == "random"
    prompts = [[prompt for prompt, _ in call] for call in llm.calls]
    assert len(prompts) == 3 and len({str(call) for call in prompts}) == 3
    assert {tuple(len(prompt) for prompt in call) for call in prompts} == {tuple(mix.lengths)}
    assert "of the floor" in render(records, "markdown")


def test_too_long_a_request_is_refused_before_any_runs(config: ModelConfig):
    llm: Any = FakeLLM(config)
    requests = [SampleRequest([1] * 5, 2), SampleRequest([1] * 510, 3)]
    with pytest.raises(ValueError, match="has 510 tokens and asks for 3: 513 is above the model's 512"):
        bench(llm, lambda run: requests, [("a", list[SampleRequest])], CEILINGS)
    assert not llm.calls
    check(llm, requests[:1])


def test_warm_up_has_the_lengths_alone(config: ModelConfig):
    llm: Any = FakeLLM(config)
    requests = Mix(3, 30, 40, 2).requests(config.vocab_size)
    warm_up(llm, requests)
    given = [prompt for prompt, _ in llm.calls[0]]
    assert [len(p) for p in given] == [len(r.prompt) for r in requests] and given != [r.prompt for r in requests]


# --- the least time ---------------------------------------------------------------------------------------------------


@pytest.fixture
def footprint(config: ModelConfig) -> Footprint:
    return Footprint.dense(config, torch.bfloat16)


def outcome(prompt: int, new: int, first: float, gap: float, cached: int = 0) -> Outcome:
    gaps = [gap] * (new - 1)
    return Outcome(prompt, new, 0.0, first, gaps, first + sum(gaps), cached)


def test_prompts_are_bound_by_their_operations(footprint: Footprint):
    limit = Limit(footprint, 4, Ceilings(bandwidth=1e18, matrix_rate=1e9))
    cost = step_cost(footprint, [30, 5], [30, 25])
    seconds, kind = limit.prompts([(30, 30), (5, 25)])
    assert seconds == pytest.approx(cost.flops / 1e9) and kind == "bfloat16 matrix rate over the step's FLOPs"


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_decode_steps_read_the_weights_once_a_step_and_every_context(footprint: Footprint, max_batch: int):
    """As many sequences as may run are in each step, and each step's context is one more than the last."""
    limit = Limit(footprint, max_batch, Ceilings(bandwidth=1e9, matrix_rate=1e18))
    spans = [(11, 16), (31, 31), (21, 23)]
    kv = sum(
        step_cost(footprint, [1], [context]).kv_bytes for first, last in spans for context in range(first, last + 1)
    )
    steps = {1: 10, 2: 6, 8: 6}[max_batch]
    seconds, kind = limit.decoding(spans)
    assert seconds == pytest.approx((steps * footprint.weight_bytes + kv) / 1e9, rel=1e-9)
    assert kind == "read bandwidth over weight + KV bytes"
    by_matrix = Limit(footprint, max_batch, Ceilings(bandwidth=1e18, matrix_rate=1e9))
    flops = sum(step_cost(footprint, [1], [c]).flops for a, b in spans for c in range(a, b + 1))
    assert by_matrix.decoding(spans)[0] == pytest.approx(flops / 1e9)


def test_the_floor_is_of_what_was_computed(footprint: Footprint):
    limit = Limit(footprint, 4, CEILINGS)
    done = [outcome(20, 3, 1.0, 1.0, cached=16), outcome(9, 1, 1.0, 1.0)]
    spans = [(21, 22), (10, 9)]
    seconds, kind = limit.floor(done, spans)
    first, steps = limit.prompts([(4, 20), (9, 9)])[0], limit.decoding([(21, 22)])[0]
    assert first is not None and steps is not None and seconds == pytest.approx(first + steps)
    assert kind is not None and kind.startswith("prompts: ") and "; decode steps: " in kind
    assert limit.floor(done[1:], spans[1:])[0] == pytest.approx(limit.prompts([(9, 9)])[0])
    assert Limit(footprint, 4, Ceilings()).floor(done, spans) == (None, None)


def test_phases_are_cut_at_the_last_first_token(footprint: Footprint):
    limit = Limit(footprint, 4, CEILINGS)
    # First tokens at 10 and 25 ms; the early one decodes at 12, 14, …, 24 meanwhile.
    done = [outcome(20, 11, 10.0, 2.0), outcome(8, 3, 25.0, 2.0, cached=4)]
    first, rest = split(done, 0.032, limit)
    assert (first.phase, first.seconds, first.prompt_tokens, first.new_tokens) == ("prompts", 0.025, 24, 9)
    assert rest.phase == "decode" and rest.seconds == pytest.approx(0.007) and rest.new_tokens == 3 + 2
    assert first.floor_s == pytest.approx(limit.floor(done, [(21, 27)])[0])
    assert rest.floor_s == pytest.approx(limit.decoding([(28, 30), (9, 10)])[0])
    assert rest.floor_share == pytest.approx((rest.floor_s or 0) / 0.007)
    assert first.new_tokens + rest.new_tokens == sum(item.new_tokens for item in done)
    # Nothing but first tokens: no other phase.
    assert [phase.phase for phase in split([outcome(5, 1, 3.0, 0.0)], 0.004, limit)] == ["prompts"]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    asked = count()
    with follow_progress(10, "tokens", lambda: next(asked)):
        pass
    assert capsys.readouterr().err == "" and next(asked) == 0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with follow_progress(10, "tokens", lambda: next(asked)):
        time.sleep(0.6)
    assert next(asked) >= 2
    with pytest.raises(KeyError), follow_progress(10, "tokens", lambda: 1):
        raise KeyError("passed on")


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> Any:
    from engine.llm import LLM, EngineConfig

    return LLM(TINY, EngineConfig(kv_cache="paged", max_batch=4))


def test_offline_on_the_bundled_model(llm: Any):
    requests = Mix(6, 4, 40, 5).requests(llm.config.vocab_size)
    result = measure(llm, requests, CEILINGS)
    assert [(o.prompt_tokens, o.new_tokens, o.error) for o in result.outcomes] == [
        (len(request.prompt), 5, None) for request in requests
    ]
    assert result.floor_s is not None and result.floor_s > 0
    assert sum(phase.seconds for phase in result.phases) == pytest.approx(result.seconds)
    assert sum(phase.new_tokens for phase in result.phases) == 30


def test_online_on_the_bundled_model(llm: Any):
    requests = arrive(Mix(6, 4, 40, 5).requests(llm.config.vocab_size, run=1), rate=50.0)
    result = measure(llm, requests, CEILINGS)
    assert [(o.prompt_tokens, o.new_tokens, o.error) for o in result.outcomes] == [
        (len(request.prompt), 5, None) for request in requests
    ]
    begins = [outcome.begin for outcome in result.outcomes]
    assert all(begin >= request.arrival for begin, request in zip(begins, requests, strict=True))
    assert result.seconds >= max(o.begin + o.e2e_ms / 1e3 for o in result.outcomes)
    assert all(a <= b for a, b in pairwise(begins))


def test_a_shared_prefix_is_computed_once(llm: Any):
    mix = Mix(4, 5, 5, 2, prefix_tokens=96)
    prefix, *rest = mix.requests(llm.config.vocab_size, run=2)
    run_offline(llm, [prefix])
    result = measure(llm, rest, CEILINGS)
    assert all(outcome.cached_tokens == 96 for outcome in result.outcomes) and result.computed_tokens == 15


def test_the_client_needs_no_torch():
    code = "import sys, engine.bench.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
