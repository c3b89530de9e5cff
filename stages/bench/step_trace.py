"""Trace of the GPU in a step and between steps while it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.bench.workloads import Mix
from stages.bench.context import Context
from stages.bench.requests import add, list_metrics
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed

if TYPE_CHECKING:
    from engine.llm import LLM

NAME = "step_trace"
BATCHES = (8, 64)
TOKENS, STEPS, KERNELS = 512, 128, 10


def rows(context: Context, gpu: bool) -> list[Listed]:
    """Beside these there are the kernels that take most."""
    return [
        row
        for batch in BATCHES
        for row in list_metrics(NAME, f"batch {batch}", ("gpu_idle_share",), batch=batch, context=TOKENS)
    ]


@dataclass(frozen=True)
class Span:
    """Something that ran on the GPU, in microseconds."""

    name: str
    begin: float
    end: float


def measure(context: Context) -> None:
    """Adds the share of the time in which the GPU was idle while it decoded, and the kernels that took the most."""
    rows, knobs = context.rows, context.knobs
    for batch in BATCHES:
        name = f"batch {batch}"
        shared: dict[str, Any] = knobs | {"batch": batch, "context": TOKENS}
        spans = trace_steps(context.llm, batch)
        idle, taken = summarize_trace(spans)
        add(rows, NAME, name, "gpu_idle_share", idle, note=f"{len(spans)} kernels and copies", **shared)
        for kernel, share in taken[:KERNELS]:
            add(rows, NAME, f"{name}: {kernel}", "gpu_time_share", share, note="of the time that the GPU ran", **shared)


def trace_steps(llm: LLM, batch: int) -> list[Span]:
    """Record what ran on the GPU in the last quarter of a run of `batch` requests, when all of them decode."""
    from torch.profiler import ProfilerActivity, profile

    from engine.bench.throughput import run_offline, warm_up

    requests = Mix(batch, TOKENS, TOKENS, STEPS).requests(llm.config.vocab_size)
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


STEP_TRACE = Suite(NAME, measure, "gpu", rows, engine_knobs)
