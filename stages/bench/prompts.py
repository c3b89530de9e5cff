"""Parts of the suites of prompts: a row a case and metric, on a GPU, with a case that does not fit saying so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stages.bench.context import Context
from stages.bench.kernels import Part, time_part
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed

COMPUTE_RATE = {"compute_rate": ("FLOP/s", "higher")}
BY_MATRIX = "rate of a large matrix product"

Case = Mapping[str, Any]
"""Knobs that name the rows of a case; a backend only where it is not the week's."""
Found = dict[str, tuple[list[float], float | None, str | None]]
"""Metric → samples, limit, kind of limit."""


def make_suite(
    name: str,
    units: Mapping[str, tuple[str, str]],
    cases: Sequence[Case],
    bench: Callable[[Context, Case], tuple[Found, str | None]],
) -> Suite:
    """A suite that measures each case on a GPU by `bench`, which gives what it found and a note, or raises TooLarge."""

    def list_case(case: Case) -> list[Listed]:
        return [
            dict(case) | {"suite": name, "metric": metric, "unit": unit, "better": better}
            for metric, (unit, better) in units.items()
        ]

    def measure(context: Context) -> None:
        from engine.bench.latency import TooLarge

        context.llm.release()  # these take caches of their own
        for case in cases:
            try:
                found, note = bench(context, case)
            except TooLarge as reason:
                context.rows.add_missing(list_case(case), str(reason), **context.knobs)
                continue
            listed = {row["metric"]: row for row in list_case(case)}
            for metric, (samples, limit, kind) in found.items():
                shared: dict[str, Any] = context.knobs | dict(listed[metric])
                context.rows.add(value=None, samples=samples, limit=limit, limit_kind=kind, note=note, **shared)

    def rows(context: Context, gpu: bool) -> list[Listed]:
        return [row for case in cases for row in list_case(case)]

    return Suite(name, measure, "gpu", rows, engine_knobs)


def rate(context: Context, calls: Sequence[Callable[[], Any]], flops: float, device: Any) -> Found:
    """FLOP/s of the calls, one after another."""
    import torch

    with torch.inference_mode():
        samples = time_part(Part("", list(calls), 0), context.workload.repeats, device)
    rates = [len(calls) * flops / (sample / 1e3) for sample in samples]
    limit = context.ceilings.matrix_rate
    return {"compute_rate": (rates, limit, None if limit is None else BY_MATRIX)}
