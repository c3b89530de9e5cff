"""Throughput of a week's engine for requests that come all at once, and the time of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.bench.workloads import Mix
from stages.bench.context import Context
from stages.bench.requests import RUN, add, add_run, check, list_metrics, mix_knobs, name_mix, read_requests, repeat
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed, Rows
from stages.standard import NO_GPU, TooSlow

if TYPE_CHECKING:
    from engine.bench.throughput import ThroughputResult

NAME = "throughput"
PHASES = ("prompts", "decode")


def rows(context: Context, gpu: bool) -> list[Listed]:
    mix = read_requests(context)
    name, knobs = name_mix(mix), mix_knobs(mix)
    metrics = (*RUN, "cached_tokens", "preemptions", "kv_wasted_share", "peak_memory_bytes")
    phases = [row for phase in PHASES for row in list_metrics(NAME, f"{name}: {phase}", ("phase_s",), **knobs)]
    return list_metrics(NAME, name, metrics, **knobs) + phases


def measure(context: Context) -> None:
    """Adds the rows; where the engine is not for the requests, they say so."""
    llm, mix = context.llm, read_requests(context)
    try:
        check(llm, mix)
    except (ValueError, TooSlow) as reason:
        context.rows.add_missing(rows(context, context.gpu), str(reason), **context.knobs)
    else:
        bench_throughput(context, mix, **context.knobs | mix_knobs(mix))
    context.add_late(NAME, vars(llm.stats()))


def bench_throughput(context: Context, mix: Mix, **knobs: Any) -> None:
    """Adds the rows of all requests at once, a run a repeat, with the time of each phase."""
    name, rows = name_mix(mix), context.rows
    results = repeat(context, mix)
    runs = [(result.outcomes, result.seconds) for result in results]
    floor = results[0].floor_s, results[0].floor_kind
    add_run(rows, NAME, name, runs, (*RUN, "cached_tokens"), floor, **knobs)
    add(rows, NAME, name, "preemptions", samples=[result.preemptions for result in results], **knobs)
    note = "of the room on running requests' pages, what held no token; mean over steps"
    add(rows, NAME, name, "kv_wasted_share", context.llm.stats().kv_wasted_share, note=note, **knobs)
    add_memory(rows, name, results, **knobs)
    for phase in PHASES:
        parts = [part for result in results for part in result.phases if part.phase == phase]
        if not parts:
            reason = "no request was completed" if phase == "prompts" else "no tokens after the last prompt's first"
            rows.add_missing(list_metrics(NAME, f"{name}: {phase}", ("phase_s",)), reason, **knobs)
            continue
        middle = sorted(parts, key=lambda part: part.seconds)[len(parts) // 2]
        add(
            rows, NAME, f"{name}: {phase}", "phase_s", middle.seconds, samples=[part.seconds for part in parts],
            limit=middle.floor_s, limit_kind=middle.floor_kind,
            note=f"{middle.prompt_tokens} prompt tokens, {middle.new_tokens} new ones", **knobs,
        )  # fmt: skip


def add_memory(rows: Rows, case: str, results: Sequence[ThroughputResult], **knobs: Any) -> None:
    peaks = [float(result.peak_memory_bytes) for result in results if result.peak_memory_bytes is not None]
    if peaks:
        add(rows, NAME, case, "peak_memory_bytes", max(peaks), samples=peaks, **knobs)
    else:
        rows.add_missing(list_metrics(NAME, case, ("peak_memory_bytes",)), NO_GPU, **knobs)


THROUGHPUT = Suite(NAME, measure, "engine", rows, engine_knobs)
