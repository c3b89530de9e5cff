"""Many requests at a time through a week's engine: what it gets through, what a shared prefix saves, decode steps of
large batches, what the GPU does in a step and between steps; and the same requests through its server, from clients.

    python -m stages.throughput <checkpoint> <EngineConfig's fields as JSON> <port>

is that server, on loopback: the stage starts it as a process of its own, loads it and stops it.

Prompts are random tokens, other ones in every run, so that no prefix cache knows them from the run before; greedy, to
the number of tokens that the workload says. Text is left out: the engine has no tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.bench.workloads import LATENCIES, Mix, Outcome, Request, arrive, describe, samples
from stages.metrics import Rows
from stages.stage import StageError
from stages.standard import NO_GPU, TooSlow

if TYPE_CHECKING:
    from engine.bench import client, throughput
    from engine.llm import LLM
    from engine.model.cost import Ceilings
    from engine.model.kv_cache import KVCache

THROUGHPUT, PREFIX, DECODE, TRACE, SERVE = "throughput", "prefix_cache", "decode_batches", "step_trace", "serve"
SUITES = (THROUGHPUT, PREFIX, DECODE, TRACE)  # of an engine in this process
BATCHES = ((64, 1024), (256, 512), (256, 1024))  # batch, context
SMALL = ((8, 64),)  # where there is no GPU
TRACED = (8, 64)  # batches of the trace, which is a GPU's
TRACED_TOKENS, TRACED_STEPS, TRACED_KERNELS = 512, 128, 10
CPU_SECONDS = 600.0  # that a run may take there by its estimate
NAME = "model"  # what the server calls it
READY_SECONDS = 900.0  # that the server may take to load its model and compile its kernels
STOP_SECONDS = 60.0

SPEEDS = ("request_throughput", "output_throughput", "total_token_throughput")
STATISTICS = {"": "p50", "_mean": "mean", "_p90": "p90", "_p99": "p99"}  # what follows a latency's name: what it is
# metric -> unit, better
UNITS: dict[str, tuple[str, str | None]] = {
    "request_throughput": ("requests/s", "higher"),
    "output_throughput": ("tokens/s", "higher"),
    "total_token_throughput": ("tokens/s", "higher"),
    "duration_s": ("s", "lower"),
    "phase_s": ("s", "lower"),
    **{latency + ending: ("ms", "lower") for latency in LATENCIES for ending in STATISTICS},
    "ttft_share": ("1", "lower"),
    "gpu_idle_share": ("1", "lower"),
    "gpu_time_share": ("1", None),
    "step_ms": ("ms", "lower"),
    "cached_tokens": ("tokens", None),
    "computed_tokens": ("tokens", "lower"),
    "preemptions": ("1", "lower"),
    "kv_wasted_share": ("1", "lower"),
    "failed": ("1", "lower"),
    "peak_memory_bytes": ("B", "lower"),
}
TIMES = tuple(latency + ending for latency in LATENCIES for ending in STATISTICS)
RUN = (*SPEEDS, "duration_s", *TIMES)
ALONE, REST, SHARED, APART = "first alone", "each of the rest alone", "all at once", "all at once, nothing shared"
AT_ONCE = (*SPEEDS, "duration_s", "ttft_ms", "cached_tokens", "computed_tokens")
WITH_PREFIX: dict[str, tuple[str, ...]] = {
    ALONE: ("ttft_ms",), REST: ("ttft_ms", "ttft_share"), SHARED: AT_ONCE, APART: AT_ONCE,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What the suites run, as the workload says."""

    requests: Mix
    shared_prefix: Mix
    clients: tuple[int, ...]
    rates: tuple[float, ...]
    new_tokens: int  # decode steps of a run
    repeats: int


# --- rows -------------------------------------------------------------------------------------------------------------


def name_mix(mix: Mix) -> str:
    """As "256 requests of 32 to 1024 tokens, 128 new", or with what all begin with."""
    own = f"{mix.low} to {mix.high}" if mix.low < mix.high else str(mix.low)
    shared = f"{mix.prefix_tokens} shared and " if mix.prefix_tokens else ""
    return f"{mix.count} requests of {shared}{own} tokens, {mix.new_tokens} new"


def mix_knobs(mix: Mix) -> dict[str, Any]:
    """What of a mix the rows' knobs can say; prompts of many lengths have none."""
    return {
        "batch": mix.count,
        "new_tokens": mix.new_tokens,
        "prompt_tokens": mix.prefix_tokens + mix.low if mix.low == mix.high else None,
    }


def list_rows(suite: str, sizes: Sizes, gpu: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(case, metric, knobs) of a suite's rows; gpu: whether of a host that has one."""
    if suite == THROUGHPUT:
        name, knobs = name_mix(sizes.requests), mix_knobs(sizes.requests)
        metrics = (*RUN, "cached_tokens", "preemptions", "kv_wasted_share", "peak_memory_bytes")
        rows = [(name, metric, knobs) for metric in metrics]
        return rows + [(f"{name}: {phase}", "phase_s", knobs) for phase in ("prompts", "decode")]
    if suite == PREFIX:
        knobs = mix_knobs(sizes.shared_prefix)
        name = name_mix(sizes.shared_prefix)
        return [(f"{name}: {how}", metric, knobs) for how, metrics in WITH_PREFIX.items() for metric in metrics]
    if suite == DECODE:
        return [
            (f"batch {batch} context {context}", metric, {"batch": batch, "context": context})
            for batch, context in (BATCHES if gpu else SMALL)
            for metric in ("step_ms", "output_throughput")
        ]
    if suite == TRACE:  # beside these, the kernels that take most
        knobs = {"context": TRACED_TOKENS}
        return [(f"batch {batch}", "gpu_idle_share", knobs | {"batch": batch}) for batch in TRACED if gpu]
    knobs = mix_knobs(sizes.requests)
    return [
        (name, metric, knobs | {"batch": clients})
        for name, clients, _ in list_loads(sizes)
        for metric in (*RUN, "failed")
    ]


def list_loads(sizes: Sizes) -> list[tuple[str, int | None, float]]:
    """(case, clients at a time, requests a second) of the server's suite."""
    return [
        *((f"{clients} clients", clients, math.inf) for clients in sizes.clients),
        *((f"{rate:g} requests/s", None, rate) for rate in sizes.rates),
        (f"{name_mix(sizes.requests)}, at once", None, math.inf),
    ]


def add(rows: Rows, suite: str, case: str, metric: str, value: float | None = None, **fields: Any) -> None:
    unit, better = UNITS[metric]
    rows.add(suite=suite, case=case, metric=metric, value=value, unit=unit, better=better, **fields)


def add_missing(
    rows: Rows, suite: str, sizes: Sizes, reason: str, gpu: bool, case: str | None = None, **knobs: Any
) -> None:  # fmt: skip
    """The suite's rows, or those of one case, without values, saying why; gpu: as of a host that has one."""
    for name, metric, own in list_rows(suite, sizes, gpu):
        if case in (None, name):
            unit, better = UNITS[metric]
            rows.missing(
                suite=suite, case=name, metric=metric, unit=unit, better=better, reason=reason, **knobs | own
            )  # fmt: skip


def add_run(
    rows: Rows,
    suite: str,
    case: str,
    runs: Sequence[tuple[Sequence[Outcome], float]],
    metrics: Sequence[str] = RUN,
    floor: tuple[float | None, str | None] = (None, None),
    note: str | None = None,
    **knobs: Any,
) -> None:
    """Rows of repeated runs of the same requests (outcomes, seconds): speeds with a sample a run, latencies of all
    requests together, the median with a sample a request.

    floor: the least seconds of a run, and why. Where requests have failed, every row says so.
    """
    every = [outcome for outcomes, _ in runs for outcome in outcomes]
    done = [[outcome for outcome in outcomes if outcome.error is None] for outcomes, _ in runs]
    kinds = sorted({f"{outcome.error}: {outcome.detail}" for outcome in every if outcome.error})
    fields: dict[str, Any] = knobs | {"note": note}
    if kinds:
        said = f"{len(every) - sum(map(len, done))} of {len(every)} requests failed: {'; '.join(kinds)}"
        fields |= {"status": "failed", "note": said[:500]}
    counted = {
        "request_throughput": [len(run) for run in done],
        "output_throughput": [sum(outcome.new_tokens for outcome in run) for run in done],
        "total_token_throughput": [sum(o.new_tokens + o.prompt_tokens for o in run) for run in done],
    }
    seconds, (least, kind) = [spent for _, spent in runs], floor
    for metric in metrics:
        if metric in counted:
            speeds = [count / spent for count, spent in zip(counted[metric], seconds, strict=True)]
            best = counted[metric][0] / least if least else None
            add(rows, suite, case, metric, samples=speeds, limit=best, limit_kind=kind, **fields)
        elif metric == "duration_s":
            add(rows, suite, case, metric, samples=seconds, limit=least, limit_kind=kind, **fields)
        elif metric == "failed":
            add(rows, suite, case, metric, float(len(every) - sum(map(len, done))), **fields)
        elif metric == "cached_tokens":
            add(rows, suite, case, metric, samples=[sum(o.cached_tokens for o in run) for run in done], **fields)
        elif metric in TIMES:
            latency, ending = split_name(metric)
            values = samples(every, latency)
            found = describe(values)[STATISTICS[ending]]
            if found is not None:
                # Gaps between tokens are too many to keep.
                kept = {"samples": values} if not ending and latency != "itl_ms" else {}
                add(rows, suite, case, metric, found, **fields, **kept)
            else:
                unit, better = UNITS[metric]
                reason = "no request was completed" if kinds else "needs two or more new tokens"
                rows.missing(suite=suite, case=case, metric=metric, unit=unit, better=better, reason=reason, **knobs)


def split_name(metric: str) -> tuple[str, str]:
    """ "ttft_ms_p90" as ("ttft_ms", "_p90")."""
    latency = next(name for name in LATENCIES if metric.startswith(name))
    return latency, metric.removeprefix(latency)


# --- an engine in this process ----------------------------------------------------------------------------------------


def bench(suite: str, rows: Rows, llm: LLM, sizes: Sizes, ceilings: Ceilings, **knobs: Any) -> None:
    """The suite's rows from `llm`, on whatever device it is. What it cannot run is rows that say why."""
    gpu = llm.engine.device == "cuda"
    if suite in (DECODE, TRACE):
        if suite == DECODE:
            llm.release()  # a cache of our own takes the place of the engine's
            bench_decode(rows, llm, sizes, ceilings, **knobs)
        elif gpu:
            bench_trace(rows, llm, **knobs)
        return
    mix = sizes.requests if suite == THROUGHPUT else sizes.shared_prefix
    try:
        check(llm, suite, mix)
    except (ValueError, TooSlow) as reason:
        add_missing(rows, suite, sizes, str(reason), gpu, **knobs)
        return
    run = bench_throughput if suite == THROUGHPUT else bench_prefix
    run(rows, llm, mix, sizes.repeats, ceilings, **knobs | mix_knobs(mix))


def check(llm: LLM, suite: str, mix: Mix) -> None:
    """Raises ValueError for requests the model or the engine is not for, TooSlow for a CPU that would take too long."""
    from engine.bench.throughput import run_offline

    if mix.longest > llm.max_model_len:
        raise ValueError(f"a request of {mix.longest} tokens, prompt and new ones; the model has {llm.max_model_len}")
    if suite == PREFIX and not (llm.engine.kv_cache == "paged" and llm.engine.prefix_cache):
        raise ValueError("this week's engine has no prefix cache")
    if llm.engine.device == "cuda":
        return
    run_offline(llm, [Request([1], 1)])
    tokens = 8
    _, seconds = run_offline(llm, [Request([0] * tokens, 2)])
    total = sum(mix.lengths) + mix.count * (mix.prefix_tokens + mix.new_tokens)
    expected = seconds / (tokens + 2) * total
    if expected > CPU_SECONDS:
        raise TooSlow(f"one run would take about {expected:.0f} s, over the {CPU_SECONDS:.0f} s a case may take")


def bench_throughput(rows: Rows, llm: LLM, mix: Mix, repeats: int, ceilings: Ceilings, **knobs: Any) -> None:
    """All requests at once, a run a repeat, with the time of each phase."""
    name = name_mix(mix)
    results = repeat(llm, mix, repeats, ceilings)
    runs = [(result.outcomes, result.seconds) for result in results]
    floor = results[0].floor_s, results[0].floor_kind
    add_run(rows, THROUGHPUT, name, runs, (*RUN, "cached_tokens"), floor, **knobs)
    add(rows, THROUGHPUT, name, "preemptions", samples=[result.preemptions for result in results], **knobs)
    note = "of the room on running requests' pages, what held no token; mean over steps"
    add(rows, THROUGHPUT, name, "kv_wasted_share", llm.stats().kv_wasted_share, note=note, **knobs)
    add_memory(rows, THROUGHPUT, name, results, **knobs)
    for phase in ("prompts", "decode"):
        parts = [part for result in results for part in result.phases if part.phase == phase]
        if not parts:
            unit, better = UNITS["phase_s"]
            reason = "no request was completed" if phase == "prompts" else "no tokens after the last prompt's first"
            rows.missing(
                suite=THROUGHPUT, case=f"{name}: {phase}", metric="phase_s", unit=unit, better=better, reason=reason,
                **knobs,
            )  # fmt: skip
            continue
        middle = sorted(parts, key=lambda part: part.seconds)[len(parts) // 2]
        add(
            rows, THROUGHPUT, f"{name}: {phase}", "phase_s", middle.seconds, samples=[part.seconds for part in parts],
            limit=middle.floor_s, limit_kind=middle.floor_kind,
            note=f"{middle.prompt_tokens} prompt tokens, {middle.new_tokens} new ones", **knobs,
        )  # fmt: skip


def repeat(llm: LLM, mix: Mix, repeats: int, ceilings: Ceilings) -> list[throughput.Result]:
    """Runs of the mix after one to warm up; on a CPU no more are begun once the first have taken CPU_SECONDS / 10."""
    from engine.bench.throughput import measure, warm_up

    requests = mix.requests(llm.config.vocab_size)
    gpu = llm.engine.device == "cuda"
    # A CPU has no graphs to capture.
    warm_up(llm, requests if gpu else [replace(requests[0], new_tokens=1)])
    results, begin = [], time.perf_counter()
    for run in range(repeats):
        if run and not gpu and time.perf_counter() - begin > CPU_SECONDS / 10:
            break
        results.append(measure(llm, mix.requests(llm.config.vocab_size, run), ceilings))
    return results


def add_memory(rows: Rows, suite: str, case: str, results: Sequence[throughput.Result], **knobs: Any) -> None:
    peaks = [float(result.peak_memory_bytes) for result in results if result.peak_memory_bytes is not None]
    if peaks:
        add(rows, suite, case, "peak_memory_bytes", max(peaks), samples=peaks, **knobs)
    else:
        rows.missing(
            suite=suite, case=case, metric="peak_memory_bytes", unit="B", better="lower", reason=NO_GPU, **knobs
        )  # fmt: skip


def bench_prefix(rows: Rows, llm: LLM, mix: Mix, repeats: int, ceilings: Ceilings, **knobs: Any) -> None:
    """Requests that begin with the same tokens: the first alone, then each of the rest alone; and all at once, beside
    as many prompts of the same lengths that share nothing."""
    from engine.bench.throughput import Limit, measure, run_offline

    vocabulary, name = llm.config.vocab_size, name_mix(mix)
    apart = replace(mix, low=mix.low + mix.prefix_tokens, high=mix.high + mix.prefix_tokens, prefix_tokens=0)
    at_once = {SHARED: repeat(llm, mix, repeats, ceilings), APART: repeat(llm, apart, repeats, ceilings)}
    for request in mix.requests(vocabulary, run=repeats)[:2]:  # one alone takes other kernels than many
        run_offline(llm, [request])
    first, *others = mix.requests(vocabulary, run=repeats + 1)  # a prefix that no run before had
    cold = measure(llm, [first], ceilings).outcomes
    warm = [outcome for request in others for outcome in measure(llm, [request], ceilings).outcomes]
    limit = Limit(llm.config, llm.weights.dtype, llm.engine.max_batch, ceilings)
    middle = statistics.median_low(mix.lengths[1:] or mix.lengths)
    for how, outcomes, computed in ((ALONE, cold, len(first.prompt)), (REST, warm, middle)):
        # With one request there is no rest.
        if not (found := samples(outcomes, "ttft_ms")):
            add_absent(rows, f"{name}: {how}", "there is no other request", **knobs)
            continue
        seconds, kind = limit.prompts([(computed, mix.prefix_tokens + computed if how == REST else computed)])
        least = None if seconds is None else seconds * 1e3
        case = f"{name}: {how}"
        add(rows, PREFIX, case, "ttft_ms", samples=found, limit=least, limit_kind=kind, **knobs)
        if how == REST:
            share = statistics.median(found) / cold[0].ttft_ms
            add(rows, PREFIX, case, "ttft_share", share, note="of the first request's", **knobs)
    for how, results in at_once.items():
        case = f"{name}: {how}"
        runs = [(result.outcomes, result.seconds) for result in results]
        floor = results[0].floor_s, results[0].floor_kind
        add_run(rows, PREFIX, case, runs, (*SPEEDS, "duration_s", "ttft_ms", "cached_tokens"), floor, **knobs)
        once = sum(mix.lengths) + mix.prefix_tokens * (1 if how == SHARED else mix.count)
        add(
            rows, PREFIX, case, "computed_tokens", samples=[result.computed_tokens for result in results],
            limit=float(once), limit_kind="each prompt's own tokens and the prefix once" if how == SHARED else "all",
            **knobs,
        )  # fmt: skip


def add_absent(rows: Rows, case: str, reason: str, **knobs: Any) -> None:
    for metric in WITH_PREFIX[REST]:
        unit, better = UNITS[metric]
        rows.missing(suite=PREFIX, case=case, metric=metric, unit=unit, better=better, reason=reason, **knobs)


# --- decode steps -----------------------------------------------------------------------------------------------------


def bench_decode(rows: Rows, llm: LLM, sizes: Sizes, ceilings: Ceilings, **knobs: Any) -> None:
    """Decode steps of many sequences at one context, as the engine runs them, on a cache of random numbers."""
    from engine.bench.latency import Case, Result, TooLarge, case_cost

    gpu = llm.engine.device == "cuda"
    for batch, context in BATCHES if gpu else SMALL:
        name = f"batch {batch} context {context}"
        try:
            spent = time_steps(llm, batch, context, sizes.new_tokens, sizes.repeats)
        except TooLarge as reason:
            add_missing(rows, DECODE, sizes, str(reason), gpu, name, **knobs)
            continue
        case = Case(prompt=0, new=sizes.new_tokens, depth=context)
        cost, steps = case_cost(llm.config, llm.weights.dtype, case, batch)
        limit, kind = ceilings.milliseconds(cost)
        result = Result(case, batch, spent, steps, limit, kind)
        shared: dict[str, Any] = knobs | {"batch": batch, "context": context, "limit_kind": kind}
        add(rows, DECODE, name, "step_ms", samples=[s / steps * 1e3 for s in spent], limit=limit, **shared)
        best = None if limit is None else batch / limit * 1e3
        add(rows, DECODE, name, "output_throughput", samples=result.rates, limit=best, **shared)


def time_steps(llm: LLM, batch: int, context: int, steps: int, repeats: int) -> list[float]:
    """Seconds of each run of `steps` decode steps after `context` tokens, after a short one. Raises TooLarge."""
    from engine.bench.latency import run_decode, seconds, start_decode
    from engine.runtime.decode_loop import DecodeLoop

    loop = DecodeLoop(llm.model, random_cache(llm, batch, context + steps), llm.engine.captures)
    spent = []
    for run in range(repeats + 1):
        start_decode(loop, batch, context)
        if run == 0:
            run_decode(loop, min(steps, 3))
        else:
            spent.append(seconds(lambda: run_decode(loop, steps), llm.weights.device))
    return spent


def random_cache(llm: LLM, batch: int, positions: int) -> KVCache:
    """A cache of random numbers, of the kind that the engine uses; paged, with each sequence's pages anywhere.

    Raises:
        TooLarge: The model has fewer positions, or the GPU less free memory.
    """
    import random

    import torch

    from engine.bench import latency
    from engine.model.cost import kv_bytes_per_token

    model = llm.model
    if llm.engine.kv_cache != "paged":
        return latency.random_cache(model, batch, positions)
    if positions > model.max_positions:
        raise latency.TooLarge(f"{positions} positions; the model has {model.max_positions}")
    width = -(-positions // llm.engine.page_size)
    device = model.weights.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        size = batch * width * llm.engine.page_size * kv_bytes_per_token(model.config, model.weights.dtype)
        free = torch.cuda.mem_get_info(device)[0]
        if size > 0.9 * free:
            raise latency.TooLarge(f"a cache of {size / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free")
    cache = model.new_paged_cache(
        pages=batch * width, slots=batch, capacity=positions, page_size=llm.engine.page_size
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(generator=generator)
    pages = random.Random(0).sample(range(batch * width), batch * width)
    cache.assign({slot: pages[slot * width : (slot + 1) * width] for slot in range(batch)})
    return cache


# --- a trace ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Something that ran on the GPU, in microseconds."""

    name: str
    begin: float
    end: float


def bench_trace(rows: Rows, llm: LLM, **knobs: Any) -> None:
    """The share of the time in which nothing ran on the GPU while it decoded, and the kernels that took the most."""
    for batch in TRACED:
        name = f"batch {batch}"
        shared: dict[str, Any] = knobs | {"batch": batch, "context": TRACED_TOKENS}
        spans = trace_steps(llm, batch)
        idle, taken = summarize_trace(spans)
        add(rows, TRACE, name, "gpu_idle_share", idle, note=f"{len(spans)} kernels and copies", **shared)
        for kernel, share in taken[:TRACED_KERNELS]:
            add(
                rows, TRACE, f"{name}: {kernel}", "gpu_time_share", share, note="of the time that the GPU ran", **shared
            )


def trace_steps(llm: LLM, batch: int) -> list[Span]:
    """What ran on the GPU in the last quarter of a run of `batch` requests, when all of them decode."""
    from torch.profiler import ProfilerActivity, profile

    from engine.bench.throughput import run_offline, warm_up

    requests = Mix(batch, TRACED_TOKENS, TRACED_TOKENS, TRACED_STEPS).requests(llm.config.vocab_size)
    warm_up(llm, requests)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_offline(llm, requests)
    found = profiler.events() or []
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in found
        if event.device_type.name == "CUDA"
    ]
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    return [span for span in spans if span.begin >= begin + 0.75 * (end - begin)]


def summarize_trace(spans: Sequence[Span]) -> tuple[float, list[tuple[str, float]]]:
    """The share of the time from the first to the last in which none ran, and each name's share of their sum, largest
    first. Spans may overlap."""
    ordered = sorted(spans, key=lambda span: span.begin)
    begin, end, idle = ordered[0].begin, ordered[0].end, 0.0
    taken: dict[str, float] = {}
    for span in ordered:
        idle += max(0.0, span.begin - end)
        end = max(end, span.end)
        taken[span.name] = taken.get(span.name, 0.0) + span.end - span.begin
    total = sum(taken.values())
    shares = [(name, spent / total) for name, spent in taken.items()]
    return idle / (end - begin), sorted(shares, key=lambda share: -share[1])


# --- a server and its clients -----------------------------------------------------------------------------------------


def bench_server(
    rows: Rows, url: str, model: str, vocabulary: int, sizes: Sizes, **knobs: Any
) -> None:  # fmt: skip
    """Every load of `list_loads` against the server at `url`, each with requests of its own."""
    from engine.bench.client import Server, run

    server = Server(url, model)
    mix = sizes.requests
    # Kernels are loaded and graphs captured.
    asyncio.run(run(server, mix.requests(vocabulary)))
    for index, (name, clients, rate) in enumerate(list_loads(sizes), start=1):
        requests = arrive(mix.requests(vocabulary, index), rate, seed=index)
        result: client.Result = asyncio.run(run(server, requests, clients))
        fields: dict[str, Any] = knobs | mix_knobs(mix) | {"batch": clients}
        if clients is None:
            fields["note"] = f"each sent at most {max(result.late_ms):.1f} ms after its time"
        add_run(rows, SERVE, name, [(result.outcomes, result.seconds)], (*RUN, "failed"), **fields)


def read_stats(url: str) -> dict[str, Any]:
    """The engine's statistics, as the server at `url` gives them."""
    import httpx

    answer = httpx.get(f"{url}/stats", timeout=30.0, trust_env=False)
    answer.raise_for_status()
    return answer.json()


@contextlib.contextmanager
def serving(command: Callable[[int], Sequence[str]], ready_seconds: float = READY_SECONDS) -> Iterator[str]:
    """The address of a server that `command`, given a free port on loopback, starts; it is stopped at the end.

    Raises:
        StageError: It ends, or does not answer /health in `ready_seconds`; says what it last wrote.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command(port), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(process, url, ready_seconds, log)
            yield url
            if process.poll() is not None:
                raise StageError(f"the server ended with status {process.returncode}: {last_lines(log)}")
        finally:
            stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float, log: IO[str]) -> None:
    import httpx

    end = time.monotonic() + seconds
    while True:
        if process.poll() is not None:
            raise StageError(f"the server ended with status {process.returncode}: {last_lines(log)}")
        # Nobody listens yet, or it is not ready.
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                return
        if time.monotonic() > end:
            raise StageError(f"the server was not ready after {seconds:g} s: {last_lines(log)}")
        time.sleep(0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and end it where it does not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_lines(log: IO[str]) -> str:
    log.seek(0)
    return " | ".join(log.read().strip().splitlines()[-3:]) or "it wrote nothing"


def server_command(path: Path, settings: dict[str, Any]) -> Callable[[int], list[str]]:
    """What starts our server for a checkpoint with EngineConfig's fields."""
    return lambda port: [
        sys.executable, "-m", "stages.throughput", str(path), json.dumps(settings), str(port)
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    from engine.llm import LLM, EngineConfig
    from engine.server.app import Settings
    from engine.server.serve import serve
    from stages.hf import set_threads

    path, settings, port = arguments

    def load() -> LLM:
        llm = LLM(path, EngineConfig(**json.loads(settings)))
        set_threads(llm.config.parameter_count())
        # As the engine is measured without it: text is left out, and requests are token ids.
        llm.tokenizer = None
        return llm

    # Every request of a run may wait.
    serve(load, Settings(models=(NAME,), max_waiting=1 << 16), port=int(port), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1:])
