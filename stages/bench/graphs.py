"""CUDA graphs of a decode step: what capturing one costs, what replaying it does, and the host's time a token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.bench.decode_step import Found, make_suite, name_case
from stages.params import Workload

if TYPE_CHECKING:
    from engine.model.cost import Ceilings
    from engine.model.transformer import Model

CASES = ((1, 128), (8, 128), (32, 128))  # batch, context
UNITS: dict[str, tuple[str, str | None]] = {
    "step_ms": ("ms", "lower"),
    "host_us_per_token": ("µs", "lower"),
    "capture_ms": ("ms", "lower"),
}
EAGER, GRAPH, MANY = "without a graph", "graph", "graph of many steps"


def bench_graphs(model: Model, workload: Workload, ceilings: Ceilings, graph: bool, batch: int, context: int) -> Found:
    """What capturing a step costs, what replaying it does, and the host's time a token.

    Host time of single steps: enqueueing one and taking over its tokens once they are there. Of many: enqueueing them
    all, over their tokens.
    """
    from engine.bench.latency import Case, case_cost, measure_decode, random_cache, seconds, start_decode
    from engine.runtime.decode_loop import DecodeLoop

    steps, repeats, device = workload.new_tokens, workload.repeats, model.weights.device
    size = name_case(batch, context)
    cost, _ = case_cost(model.footprint, Case(0, steps, context), batch)
    limit, kind = ceilings.milliseconds(cost)
    eager, replayed = (
        [sample / steps * 1e3 for sample in measure_decode(model, batch, steps, context, repeats, captured)]
        for captured in (False, True)
    )
    loop = DecodeLoop(model, random_cache(model, batch, context + steps), graph=True)
    start_decode(loop, batch, context)
    captures = [seconds(loop.capture, device) * 1e3 for _ in range(repeats)]
    many, host_many, host_single = [], [], []
    for repeat in range(repeats + 1):
        start_decode(loop, batch, context)
        spent: list[float] = []
        whole = seconds(lambda spent=spent: spent.append(clocked(lambda: loop.advance(steps))), device)
        start_decode(loop, batch, context)
        single = 0.0
        for _ in range(steps):
            single += clocked(loop.enqueue)
            seconds(lambda: None, device)
            single += clocked(loop.wait)
        if repeat:  # the first captures
            many.append(whole / steps * 1e3)
            host_many.append(spent[0] / (steps * batch) * 1e6)
            host_single.append(single / (steps * batch) * 1e6)
    return [
        (f"{EAGER}, {size}", "step_ms", eager, limit, kind),
        (f"{GRAPH}, {size}", "step_ms", replayed, limit, kind),
        (f"{MANY}, {size}", "step_ms", many, limit, kind),
        (f"{GRAPH}, {size}", "host_us_per_token", host_single, None, None),
        (f"{MANY}, {size}", "host_us_per_token", host_many, None, None),
        (f"{GRAPH}, {size}", "capture_ms", captures, None, None),
    ]


def clocked(run: Callable[[], Any]) -> float:
    """Seconds of the host in `run`, whatever it has enqueued."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


GRAPHS = make_suite(
    "graphs",
    UNITS,
    CASES,
    lambda size: [
        (f"{how}, {name_case(*size)}", metric)
        for how, metric in (
            (EAGER, "step_ms"), (GRAPH, "step_ms"), (MANY, "step_ms"),
            (GRAPH, "host_us_per_token"), (MANY, "host_us_per_token"), (GRAPH, "capture_ms"),
        )
    ],
    bench_graphs,
)  # fmt: skip
