"""How many requests an engine gets through: `afs bench throughput` and the pipeline.

Requests that all come at once go through `LLM.generate`, others through `AsyncLLM` at their times of arrival. Greedy,
to the number of tokens that each asks for, end-of-sequence tokens ignored. Prompts are token ids, so tokenisation is
out; sampling is in, and so is decoding to text where the engine has a tokenizer.

The floor is what the machine's ceilings allow at least: the prompts' operations over the matrix rate, then the decode
steps' weights, keys and values over the read bandwidth (or the other ceiling, where that binds), one after the other.
An engine that does both in one step can hide a part of one behind the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from engine.bench.workloads import Arrive, Outcome, SampleRequest, failed, summarize
from engine.runtime.progress import show_bar
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.async_llm import AsyncLLM
    from engine.llm import LLM
    from engine.model.cost import Ceilings, Footprint
    from engine.runtime.request import Completion

LATE = ("late_kernels", "late_graphs")
Span = tuple[int, int]  # the contexts of a sequence's first and last decode step
Floor = tuple[float | None, str | None]  # seconds, and why not fewer


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of a run: what was done in it, and the least time that takes."""

    phase: str
    seconds: float
    prompt_tokens: int  # computed: those found in the prefix cache are left out
    new_tokens: int
    floor_s: float | None
    floor_kind: str | None

    @property
    def floor_share(self) -> float | None:
        """1 is all that the machine allows."""
        return None if self.floor_s is None or not self.seconds else self.floor_s / self.seconds


@dataclass(frozen=True)
class ThroughputResult:
    """A run of requests; `phases` and the floor only where all came at once, so that the engine never waited."""

    outcomes: list[Outcome]
    seconds: float
    preemptions: int
    late_kernels: int  # as EngineStats has them, in this run
    late_graphs: int
    peak_memory_bytes: int | None  # of the GPU
    floor_s: float | None
    floor_kind: str | None
    phases: list[Phase]

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not found in the prefix cache."""
        return sum(outcome.prompt_tokens - outcome.cached_tokens for outcome in self.outcomes)

    def record(self, run: str, **shared: Any) -> dict[str, Any]:
        """One flat record for `engine.bench.workloads.render`; `run` is its name."""
        return {
            "run": run,
            **shared,
            **summarize(self.outcomes, self.seconds),
            "preemptions": self.preemptions,
            "late_kernels": self.late_kernels,
            "late_graphs": self.late_graphs,
            "peak_memory_bytes": self.peak_memory_bytes,
            "floor_s": self.floor_s,
            "floor_share": None if self.floor_s is None else self.floor_s / self.seconds,
            "floor_kind": self.floor_kind,
            "phases": [asdict(phase) | {"floor_share": phase.floor_share} for phase in self.phases],
        }


def measure(llm: LLM, requests: Sequence[SampleRequest], ceilings: Ceilings) -> ThroughputResult:
    """Run the requests to their ends.

    Raises:
        ValueError: A request that the engine does not take, before anything has been computed where all come at once.
    """
    import torch

    gpu = llm.engine.device == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, at_once = llm.stats(), all(request.arrival == 0 for request in requests)
    with follow_progress(
        sum(request.new_tokens for request in requests),
        "tokens",
        lambda: llm.stats().generated_tokens - before.generated_tokens,
    ):
        outcomes, seconds = run_offline(llm, requests) if at_once else asyncio.run(_run_online(llm, requests))
    peak = torch.cuda.max_memory_allocated() if gpu else None
    floor: Floor = (None, None)
    phases: list[Phase] = []
    done = [outcome for outcome in outcomes if outcome.error is None]
    if at_once and done:
        limit = Limit(llm.model.footprint, llm.engine.max_batch, ceilings)
        floor = limit.floor(done, [(o.prompt_tokens + 1, o.prompt_tokens + o.new_tokens - 1) for o in done])
        phases = split(done, seconds, limit)
    after = llm.stats()
    counts = {name: getattr(after, name) - getattr(before, name) for name in ("preemptions", *LATE)}
    return ThroughputResult(
        outcomes, seconds, **counts, peak_memory_bytes=peak, floor_s=floor[0], floor_kind=floor[1], phases=phases
    )


def warm_up(llm: LLM, requests: Sequence[SampleRequest]) -> None:
    """The requests' lengths with other tokens, all at once: kernels are loaded, and graphs captured of every size, as
    requests end one after another. What a prefix cache keeps of them is no prompt's beginning."""
    drawn, ids = random.Random(f"not {requests[0].prompt}"), range(llm.config.vocab_size)
    few = [2 + (len(requests) // (1 + index)).bit_length() for index in range(len(requests))]
    run_offline(
        llm,
        [
            SampleRequest(drawn.choices(ids, k=len(request.prompt)), min(most, request.new_tokens))
            for request, most in zip(requests, few, strict=True)
        ],
    )


def run_offline(llm: LLM, requests: Sequence[SampleRequest]) -> tuple[list[Outcome], float]:
    """All requests in one call of `generate`; outcomes in their order, and seconds. Raises ValueError as it does."""
    prompts, params = [request.prompt for request in requests], [_params(request) for request in requests]
    begin = time.perf_counter()
    completions = llm.generate(prompts, params)
    return [_outcome(completion, 0.0) for completion in completions], time.perf_counter() - begin


async def _run_online(llm: LLM, requests: Sequence[SampleRequest]) -> tuple[list[Outcome], float]:
    from engine.async_llm import AsyncLLM

    async with AsyncLLM(llm, max_waiting=len(requests)) as engine:
        return await run_online(engine, requests)


async def run_online(engine: AsyncLLM, requests: Sequence[SampleRequest]) -> tuple[list[Outcome], float]:
    """Each request at its arrival, whether or not those before it are done; outcomes in their order, and seconds.

    A request that the engine fails or refuses because its queue is full is an outcome with that error.

    Raises:
        ValueError: A request that the engine does not take.
    """
    begin = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_run_one(engine, request, begin)) for request in requests]
    except BaseExceptionGroup as group:  # the first failure ends the others
        raise group.exceptions[0] from None
    return [task.result() for task in tasks], time.perf_counter() - begin


async def _run_one(engine: AsyncLLM, request: SampleRequest, begin: float) -> Outcome:
    from engine.async_llm import QueueFull

    await asyncio.sleep(begin + request.arrival - time.perf_counter())
    try:
        stream = await engine.submit(request.prompt, _params(request))
    except QueueFull as error:
        return failed(request.arrival, "queue full", str(error))
    completion = None
    async with stream:
        async for update in stream:
            completion = update.completion
    assert completion is not None, f"request {stream.id} ended without a completion"
    return _outcome(completion, stream.arrival - begin)


def _params(request: SampleRequest) -> SamplingParams:
    return SamplingParams(max_new_tokens=request.new_tokens, temperature=0.0, ignore_eos=True)


def _outcome(completion: Completion, begin: float) -> Outcome:
    if completion.finish_reason not in ("length", "stop"):
        return failed(begin, completion.finish_reason, completion.error or "")
    return Outcome(
        prompt_tokens=len(completion.prompt_token_ids),
        new_tokens=len(completion.token_ids),
        begin=begin,
        ttft_ms=completion.ttft_ms,
        itl_ms=completion.itl_ms,
        e2e_ms=completion.e2e_ms,
        cached_tokens=completion.cached_tokens,
    )


# --- the least time ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """Least time that a model on a machine takes, with `max_batch` sequences running together at most."""

    model: Footprint
    max_batch: int
    ceilings: Ceilings

    def prompts(self, sizes: Sequence[tuple[int, int]]) -> Floor:
        """sizes: (tokens to compute, length) of each prompt. All in one pass, which no smaller ones can beat."""
        from engine.model.cost import step_cost

        cost = step_cost(self.model, [size[0] for size in sizes], [size[1] for size in sizes])
        return _seconds(self.ceilings.milliseconds(cost))

    def decoding(self, spans: Sequence[Span]) -> Floor:
        """Floor of decode steps that reach every context of every span, with as many sequences in each as may run."""
        from engine.model.cost import StepCost, step_cost

        counts = [last - first + 1 for first, last in spans]
        steps = max(-(-sum(counts) // self.max_batch), max(counts))
        kv, flops = 0.0, 0.0
        for (first, last), count in zip(spans, counts, strict=True):
            # A step's cost grows evenly with its context: the mean of the first and the last one is that of all.
            ends = [step_cost(self.model, [1], [context]) for context in (first, last)]
            kv += count * sum(end.kv_bytes for end in ends) / 2
            flops += count * sum(end.flops for end in ends) / 2
        cost = StepCost(steps * self.model.weight_bytes, round(kv), round(flops))
        return _seconds(self.ceilings.milliseconds(cost))

    def floor(self, prompts: Sequence[Outcome], spans: Sequence[Span]) -> Floor:
        """Floor of the outcomes' prompts, as far as they were computed, and the decode steps, one after the other.

        A span that ends before it begins has no steps.
        """
        sizes = [(outcome.prompt_tokens - outcome.cached_tokens, outcome.prompt_tokens) for outcome in prompts]
        spans = [(first, last) for first, last in spans if first <= last]
        parts = [("prompts", self.prompts(sizes))] if sizes else []
        parts += [("decode steps", self.decoding(spans))] if spans else []
        known = [(name, seconds, kind) for name, (seconds, kind) in parts if seconds is not None]
        if len(known) < len(parts) or not parts:
            return None, None
        return sum(seconds for _, seconds, _ in known), "; ".join(f"{name}: {kind}" for name, _, kind in known)


def _seconds(milliseconds: tuple[float | None, str | None]) -> Floor:
    value, kind = milliseconds
    return None if value is None else value / 1e3, kind


def split(outcomes: Sequence[Outcome], seconds: float, limit: Limit) -> list[Phase]:
    """The run until the last prompt's first token, and the rest, in which the engine only decodes.

    Decode steps that ran before that time are the first phase's, in its work and in its floor.
    """
    switch = max(outcome.begin + outcome.ttft_ms / 1e3 for outcome in outcomes)
    early = [_tokens_until(outcome, switch) for outcome in outcomes]  # after each one's first
    late = [outcome.new_tokens - 1 - count for outcome, count in zip(outcomes, early, strict=True)]
    spans: tuple[list[Span], list[Span]] = ([], [])
    for outcome, count in zip(outcomes, early, strict=True):
        length = outcome.prompt_tokens
        spans[0].append((length + 1, length + count))
        spans[1].append((length + count + 1, length + outcome.new_tokens - 1))
    computed = sum(outcome.prompt_tokens - outcome.cached_tokens for outcome in outcomes)
    first = limit.floor(outcomes, spans[0])
    phases = [Phase("prompts", switch, computed, len(outcomes) + sum(early), *first)]
    if sum(late):
        phases.append(Phase("decode", seconds - switch, 0, sum(late), *limit.floor([], spans[1])))
    return phases


def _tokens_until(outcome: Outcome, seconds: float) -> int:
    """Tokens after the first that were there `seconds` after the run's beginning."""
    times = accumulate(outcome.itl_ms, initial=outcome.begin * 1e3 + outcome.ttft_ms)
    return max(sum(time <= seconds * 1e3 for time in times) - 1, 0)


# --- the command ------------------------------------------------------------------------------------------------------


def bench(
    llm: LLM,
    draw: Callable[[int], list[SampleRequest]],
    schedules: Sequence[tuple[str, Arrive]],
    ceilings: Ceilings,
    **shared: Any,
) -> list[dict[str, Any]]:
    """A record of each schedule (its name, and what gives requests their arrivals), after a run to warm up.

    draw: the requests of run 0, 1, …, other ones each time. shared: fields of every record.

    Raises:
        ValueError: A request that the engine does not take, before any is run.
    """
    runs = [(name, arrive(draw(index))) for index, (name, arrive) in enumerate(schedules)]
    for _, requests in runs:
        check(llm, requests)
    warm_up(llm, runs[0][1])
    return [measure(llm, requests, ceilings).record(name, **shared) for name, requests in runs]


def check(llm: LLM, requests: Sequence[SampleRequest]) -> None:
    """Raises ValueError for the longest request where it is beyond the model's length."""
    longest = max(requests, key=lambda request: len(request.prompt) + request.new_tokens)
    total = len(longest.prompt) + longest.new_tokens
    if total > llm.max_model_len:
        raise ValueError(
            f"the longest request has {len(longest.prompt)} tokens and asks for {longest.new_tokens}: {total} is above "
            f"the model's {llm.max_model_len}"
        )


@contextlib.contextmanager
def follow_progress(total: int, unit: str, done: Callable[[], int]) -> Iterator[None]:
    """A bar on stderr where that is a terminal, moved on by asking `done` four times a second from a thread."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    with show_bar(unit, total) as move:

        def follow() -> None:
            while not ended.wait(0.25):
                move(completed=done())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
