"""Decode steps in a week's engine, on a cache of random numbers, one token a sequence and step, chosen greedily.

What a step moves at least, its weights and its keys and values, over the read bandwidth of that machine is its limit.
Its kernels one by one, and what a CUDA graph of it costs, are suites of their own (`kernels`, `graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from stages.bench.context import Context
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed
from stages.params import Workload

if TYPE_CHECKING:
    from engine.model.cost import Ceilings
    from engine.model.transformer import Model

STEP = "decode_step"
BATCHES, CONTEXTS = (1, 8, 32, 128), (128, 1024)
UNITS: dict[str, tuple[str, str | None]] = {"step_ms": ("ms", "lower"), "output_throughput": ("tokens/s", "higher")}

Size = tuple[int, int]
"""Batch, context."""
Found = list[tuple[str, str, list[float], float | None, str | None]]
"""Case, metric, samples, limit, kind of limit."""
Bench = Callable[["Model", Workload, "Ceilings", bool, int, int], Found]
"""Measures a size: model, workload, ceilings, whether steps are CUDA graphs, batch, context. Raises TooLarge."""


def name_case(batch: int, context: int) -> str:
    return f"batch {batch} context {context}"


def list_size(
    suite: str, units: Mapping[str, tuple[str, str | None]], cases: Iterable[tuple[str, str]], size: Size
) -> list[Listed]:
    """The rows (case, metric) of a size."""
    return [
        {
            "suite": suite, "case": case, "metric": metric, "unit": units[metric][0], "better": units[metric][1],
            "batch": size[0], "context": size[1],
        }
        for case, metric in cases
    ]  # fmt: skip


def make_suite(
    name: str,
    units: Mapping[str, tuple[str, str | None]],
    sizes: Sequence[Size],
    list_cases: Callable[[Size], list[tuple[str, str]]],
    bench: Bench,
) -> Suite:
    """A suite that measures decode steps of each of `sizes` on a GPU; one that the model or the memory does not hold is
    rows that say so."""

    def rows(context: Context, gpu: bool) -> list[Listed]:
        return [row for size in sizes for row in list_size(name, units, list_cases(size), size)]

    def measure(context: Context) -> None:
        from engine.bench.latency import TooLarge

        llm, knobs = context.llm, context.knobs
        llm.release()  # these take caches of their own
        for size in sizes:
            try:
                found = bench(llm.model, context.workload, context.ceilings, llm.engine.captures, *size)
            except TooLarge as reason:
                context.rows.add_missing(list_size(name, units, list_cases(size), size), str(reason), **knobs)
                continue
            for case, metric, samples, limit, kind in found:
                unit, better = units[metric]
                context.rows.add(
                    suite=name, case=case, metric=metric, value=None, samples=samples, unit=unit, better=better,
                    limit=limit, limit_kind=kind, batch=size[0], context=size[1], **knobs,
                )  # fmt: skip

    return Suite(name, measure, "gpu", rows, engine_knobs)


def bench_step(model: Model, workload: Workload, ceilings: Ceilings, graph: bool, batch: int, context: int) -> Found:
    """Decode steps as the engine runs them, each token read by the host, the next step enqueued before."""
    from engine.bench.latency import Case, measure

    case = Case(prompt=0, new=workload.new_tokens, depth=context)
    result = measure(model, case, batch, workload.repeats, graph, chunk=1, ceilings=ceilings)
    limit = None if result.limit is None else result.limit * 1e3
    name = name_case(batch, context)
    steps = [sample / result.steps * 1e3 for sample in result.samples]
    best = None if limit is None else batch / limit * 1e3
    return [
        (name, "step_ms", steps, limit, result.limit_kind),
        (name, "output_throughput", result.rates, best, result.limit_kind),
    ]


DECODE_STEP = make_suite(
    STEP,
    UNITS,
    [(batch, context) for context in CONTEXTS for batch in BATCHES],
    lambda size: [(name_case(*size), metric) for metric in UNITS],
    bench_step,
)
