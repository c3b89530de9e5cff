"""The runner: steps in the order in which they were enqueued, each with the bits of a pass over its request alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.kv_cache import KVCache
from engine.model.transformer import Model
from engine.model.weights import random_weights
from engine.ops.batch import Batch
from engine.ops.reference import ReferenceOps
from engine.runtime import graph_step
from engine.runtime.decode_loop import BUCKETS
from engine.runtime.request import Request
from engine.runtime.runner import Runner, StepResult
from engine.sampling_params import SamplingParams
from engine.scheduler.page_pool import PagePool
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import ScheduledChunk, Step

CONFIG = ModelConfig.from_dict({
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 128, "eos_token_id": None,
})  # fmt: skip
LOOPS = pytest.mark.parametrize("loops", [False, True], ids=["passes", "loops"])
PAGE, SLOTS = 8, 4


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model()


def make_model() -> Model:
    return Model(CONFIG, random_weights(CONFIG, "cpu", torch.bfloat16, 0), ReferenceOps(), max_positions=96)


def paged(model: Model) -> KVCache:
    return model.new_paged_cache(pages=24, slots=SLOTS, capacity=96, page_size=PAGE)


def new_request(id: str, prompt: list[int], new: int = 6, **fields: Any) -> Request:
    settings: dict[str, Any] = {"max_new_tokens": new, "temperature": 0.0} | fields
    params = SamplingParams(**settings)
    return Request(
        id=id, tokens=prompt, limit=len(prompt) + new, params=params, seed=3, stop_ids=frozenset(), entered=0.0
    )


class Steps:
    """A scheduler and a runner, and what was seen of them."""

    def __init__(self, model: Model, loops: bool, pages: int = 24, step_tokens: int = 24) -> None:
        self.scheduler = Scheduler(PagePool(pages, PAGE), SLOTS, step_tokens, 96)
        self.runner = Runner(model, paged(model), loops, graph=False)
        self.runner.observe = self.observe
        self.logits: dict[tuple[object, int], Tensor] = {}  # by request and position of the token that they choose
        self.results: list[StepResult] = []

    def observe(self, requests: list[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            self.logits.setdefault((request.id, request.length - 1), row.clone())

    def add(self, *requests: Request) -> None:
        for request in requests:
            request.prompt_logprobs = [None] * request.prompt_length
            self.scheduler.add(request)

    def enqueue(self) -> Step:
        step = self.scheduler.schedule()
        if step.chunks:
            self.runner.enqueue(step)
        return step

    def collect(self) -> list[StepResult]:
        results = self.runner.wait()
        self.results += results
        for request, tokens, *_ in results:
            if tokens and self.scheduler.append(request, tokens) and len(request.tokens) == request.limit:
                self.scheduler.finish(request)
        return results

    def run(self) -> list[Step]:
        """Until all have ended, one step ahead."""
        steps = []
        while len(self.scheduler):
            steps.append(self.enqueue())
            while self.runner.pending > bool(steps[-1].chunks):
                self.collect()
        return steps

    def check(self, model: Model, request: Request) -> None:
        """The logits of each generated token are those of one pass over all that stands before it."""
        tokens = torch.tensor(request.tokens[:-1], dtype=torch.int32)
        places = torch.arange(len(tokens), dtype=torch.int32)
        with torch.inference_mode():
            whole = model.forward(Batch(tokens, torch.zeros_like(tokens), places), model.new_cache(1, 96))
        for place in range(request.prompt_length, len(request.tokens)):
            assert torch.equal(self.logits[request.id, place], whole[place - 1]), (request.id, place)
            if request.params.temperature == 0 and not request.params.adjusts_logits:
                assert request.tokens[place] == int(model.ops.argmax(whole[place - 1 : place]))


@LOOPS
def test_steps_of_every_kind(model: Model, loops: bool):
    """Prompts alone, in pieces and beside others; decoding alone and beside prompts; rows that come and go."""
    steps = Steps(model, loops)
    requests = [
        new_request("short", [5, 6, 7], 12), new_request("pieces", [1 + i % 100 for i in range(50)], 3),
        new_request("drawn", [9] * 9, 5, temperature=0.8, top_k=20), new_request("one", [11], 7),
        new_request("penalised", [20, 21], 6, frequency_penalty=1.5), new_request("late", [30] * 20, 4),
    ]  # fmt: skip
    steps.add(requests[0])
    steps.enqueue()
    steps.add(*requests[1:5])
    decoding = [(step.decodes, len(step.chunks)) for step in steps.run()]
    assert any(0 < decodes < chunks for decodes, chunks in decoding)
    assert any(1 < decodes == chunks for decodes, chunks in decoding)
    steps.add(requests[5])
    steps.run()
    for request in requests:
        steps.check(model, request)
    assert steps.scheduler.pool.used == 0 and steps.runner.pending == 0


@LOOPS
def test_results_come_in_the_order_of_the_steps(model: Model, loops: bool):
    steps = Steps(model, loops)
    first, second = new_request("first", [5, 6], 4), new_request("second", [7, 8, 9], 4, logprobs=1)
    steps.add(first, second)
    steps.enqueue()
    steps.enqueue()
    assert steps.runner.pending == 2
    for _ in range(2):
        results = steps.collect()
        assert {result.request.id for result in results} == {"first", "second"}
        for request, tokens, logprobs, nan_after in results:
            assert len(tokens) == 1 and nan_after is None
            assert [entry.token for entry in logprobs] == (tokens if request is second else [])
    assert steps.runner.pending == 0 and len(first.tokens) == 4
    assert all(result.logprobs[0].rank == 1 and len(result.logprobs[0].top) == 1
               for result in steps.results if result.request is second)  # fmt: skip


@LOOPS
def test_a_slot_whose_pages_are_others(model: Model, loops: bool):
    """Preempted and let in again, in the same slot with as many pages as before, which are another request's now."""
    runner, seen = Runner(model, paged(model), loops, graph=False), []
    runner.observe = lambda requests, logits: seen.append(logits[0].clone())
    request, other = new_request("a", [5] * 12), new_request("b", [6] * 12)

    def run(request: Request, slot: int, pages: list[int], begin: int) -> None:
        request.slot, request.pages, request.length = slot, pages, len(request.tokens) + 1
        chunk = ScheduledChunk(request, begin, len(request.tokens) - begin, samples=True)
        runner.enqueue(Step([chunk], begin > 0, [], [], []))
        (result,) = runner.wait()
        request.tokens += result.tokens

    run(request, 0, [0, 1], 0)
    request.tokens.pop()
    request.preemptions += 1
    run(request, 0, [7, 3], 0)
    run(other, 1, [0, 1], 0)
    run(request, 0, [7, 3], 12)
    assert torch.equal(seen[0], seen[1])
    tokens, places = torch.tensor(request.tokens[:13], dtype=torch.int32), torch.arange(13, dtype=torch.int32)
    with torch.inference_mode():
        whole = model.forward(Batch(tokens, torch.zeros_like(tokens), places), model.new_cache(1, 96))
    assert torch.equal(seen[3], whole[-1])


@LOOPS
def test_preempted_requests_and_forks(model: Model, loops: bool):
    steps = Steps(model, loops, pages=9)
    old, young = new_request("old", [5] * 20, 24), new_request("young", [6] * 15, 24, temperature=0.7)
    fork = new_request("fork", [5] * 20, 6, temperature=0.9)
    fork.parent = old
    steps.add(old, young, fork)
    every = steps.run()
    assert young.preemptions + fork.preemptions and any(step.copies for step in every)
    for request in (old, young, fork):
        steps.check(model, request)


@LOOPS
def test_prompts_are_scored(model: Model, loops: bool):
    steps = Steps(model, loops, step_tokens=8)
    request = new_request("a", [3 + i for i in range(20)], 1, prompt_logprobs=2)
    steps.add(request)
    steps.run()
    places = torch.arange(20, dtype=torch.int32)
    with torch.inference_mode():
        batch = Batch(torch.tensor(request.tokens[:20], dtype=torch.int32), torch.zeros_like(places), places)
        scores = torch.log_softmax(model.forward(batch, model.new_cache(1, 96)).float(), -1)
    assert request.prompt_logprobs[0] is None
    for place, found in enumerate(request.prompt_logprobs[1:], 1):
        assert found is not None and found.token == request.tokens[place] and len(found.top) == 2
        assert found.logprob == pytest.approx(float(scores[place - 1, found.token]), abs=1e-5)


@LOOPS
def test_logits_that_are_nan(loops: bool):
    """Say after how many tokens; a token is none of the results. A prompt's are told before what it led to."""
    model = make_model()
    forward, spoiled = model.forward, True

    def spoil(batch: Batch, cache: KVCache) -> Tensor:
        logits = forward(batch, cache)
        return torch.full_like(logits, torch.nan) if spoiled else logits

    model.forward = spoil  # type: ignore[method-assign]
    spoiled = False
    steps = Steps(model, loops)
    plain, scored = new_request("plain", [5, 6, 7]), new_request("scored", [5, 6, 7], prompt_logprobs=0)
    steps.add(plain)
    steps.enqueue()
    assert [result.nan_after for result in steps.collect()] == [None]
    spoiled = True
    steps.enqueue()
    assert steps.collect() == [StepResult(plain, [], [], nan_after=4)]
    steps.scheduler.finish(plain)
    steps.add(scored)
    steps.enqueue()
    assert [(result.tokens, result.nan_after) for result in steps.collect()] == [([], 1), ([], 2), ([], 3)]


class Graph:
    """Runs again what was captured, into the same result."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self.run, self.result = run, run()

    def replay(self) -> None:
        self.result.copy_(self.run())


def test_every_graph_is_captured_before_it_is_needed(model: Model, monkeypatch: pytest.MonkeyPatch):
    """Each size and sampler of both loops once; steps then replay these. Without it each captures what it needs."""
    captured = 0

    def capture(run: Callable[[], Tensor], pool: Any) -> tuple[Graph, Tensor]:
        nonlocal captured
        captured += 1
        graph = Graph(run)
        return graph, graph.result

    monkeypatch.setattr(graph_step, "new_pool", lambda device: None)
    monkeypatch.setattr(graph_step, "capture", capture)
    for ready in (True, False):
        steps, captured = Steps(model, loops=True), 0
        steps.runner = Runner(model, paged(model), loops=True, graph=True)
        steps.runner.observe = steps.observe
        if ready:
            steps.runner.capture()
            prompts = [16, 32, 64]  # those that 96 positions have room for
            sizes = [size for size in BUCKETS if size <= SLOTS] + prompts
            assert captured == len(sizes) * len(graph_step.SAMPLERS)
        before = captured
        requests = [new_request("a", [5] * 4, 6), new_request("b", [6] * 30, 6, temperature=0.8),
                    new_request("c", [7] * 3, 6, logprobs=0)]  # fmt: skip
        for request in requests:
            steps.add(request)
            steps.run()
        steps.add(*(again := [new_request(f"{r.id} again", r.tokens[: r.prompt_length], 6) for r in requests]))
        steps.run()
        for request in (*requests, *again) if ready else ():  # capturing is running here, and moves the rows
            steps.check(model, request)
        assert steps.runner.late_graphs == captured - before and (captured == before) == ready
