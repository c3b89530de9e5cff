"""The standard suite's rows of a week: generation through `LLM`, greedy, from token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from stages.bench.context import Context
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed
from stages.standard import (
    DECODE,
    NO_GPU,
    PREFILL,
    TooSlow,
    add_latency,
    limits,
    list_cases,
    list_rows,
    measure_case,
)


def rows_of(name: str) -> Callable[[Context, bool], Iterable[Listed]]:
    """The suite's rows; the same with and without a GPU."""

    def rows(context: Context, gpu: bool) -> list[Listed]:
        cases = list_cases(context.workload, context.config.max_position_embeddings, (name,))
        return [row for case in cases for row in list_rows(case)]

    return rows


def measure_of(name: str) -> Callable[[Context], None]:
    """What measures the suite. Its cases' speeds tell those of the next suite how long they will take."""

    def measure(context: Context) -> None:
        from engine.sampling_params import SamplingParams

        settings, config, llm = context.settings, context.config, context.llm

        def generate(prompts: list[list[int]], new_tokens: int) -> list[float]:
            params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
            llm.core.forget()  # every repeat computes its prompts
            slowest = max(llm.generate(prompts, params), key=lambda done: done.e2e_ms)
            times = [slowest.ttft_ms]
            for gap in slowest.itl_ms:
                times.append(times[-1] + gap)
            return [milliseconds / 1e3 for milliseconds in times]

        for case in list_cases(context.workload, config.max_position_embeddings, (name,)):
            how: tuple[Any, ...] = (config.vocab_size, settings["device"], context.budget)
            try:
                latency = measure_case(generate, case, context.workload, *how)
            except TooSlow as reason:
                context.rows.add_missing(list_rows(case), str(reason), **context.knobs)
                continue
            bounds = limits(case, llm.model.footprint, context.ceilings)
            add_latency(context.rows, case, latency, bounds, None if context.gpu else NO_GPU, **context.knobs)
        context.add_late(name, vars(llm.stats()))

    return measure


STANDARD = tuple(
    Suite(name, measure_of(name), "engine", rows_of(name), engine_knobs, shared=True) for name in (PREFILL, DECODE)
)
