"""What a shared prefix saves: requests that begin with the same tokens, alone and all at once."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from engine.bench.workloads import Mix, samples
from stages.bench.context import Context
from stages.bench.requests import SPEEDS, add, add_run, check, list_metrics, mix_knobs, name_mix, repeat
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed
from stages.standard import TooSlow

NAME = "prefix_cache"
ALONE, REST, SHARED, APART = "first alone", "each of the rest alone", "all at once", "all at once, nothing shared"
AT_ONCE = (*SPEEDS, "duration_s", "ttft_ms", "cached_tokens", "computed_tokens")
WITH_PREFIX: dict[str, tuple[str, ...]] = {
    ALONE: ("ttft_ms",), REST: ("ttft_ms", "ttft_share"), SHARED: AT_ONCE, APART: AT_ONCE,
}  # fmt: skip


def read_mix(context: Context) -> Mix:
    """The workload's requests with a shared prefix."""
    many, shared = context.workload.requests, context.workload.shared_prefix
    return Mix(shared.count, *shared.own_tokens, shared.new_tokens, many.seed, shared.prefix_tokens)


def rows(context: Context, gpu: bool) -> list[Listed]:
    mix = read_mix(context)
    cases = {f"{name_mix(mix)}: {how}": metrics for how, metrics in WITH_PREFIX.items()}
    return [row for case, metrics in cases.items() for row in list_metrics(NAME, case, metrics, **mix_knobs(mix))]


def measure(context: Context) -> None:
    """Adds the rows; where the engine is not for the requests, or has no prefix cache, they say so."""
    llm, mix = context.llm, read_mix(context)
    try:
        check(llm, mix)
        if not (llm.engine.kv_cache == "paged" and llm.engine.prefix_cache):
            raise ValueError("this week's engine has no prefix cache")
    except (ValueError, TooSlow) as reason:
        context.rows.add_missing(rows(context, context.gpu), str(reason), **context.knobs)
    else:
        bench_prefix(context, mix, **context.knobs | mix_knobs(mix))
    context.add_late(NAME, vars(llm.stats()))


def bench_prefix(context: Context, mix: Mix, **knobs: Any) -> None:
    """Requests that begin with the same tokens: the first alone, then each of the rest alone; and all at once, beside
    as many prompts of the same lengths that share nothing."""
    from engine.bench.throughput import Limit, measure, run_offline

    llm, rows, ceilings, repeats = context.llm, context.rows, context.ceilings, context.workload.repeats
    vocabulary, name = llm.config.vocab_size, name_mix(mix)
    apart = replace(mix, low=mix.low + mix.prefix_tokens, high=mix.high + mix.prefix_tokens, prefix_tokens=0)
    at_once = {SHARED: repeat(context, mix), APART: repeat(context, apart)}
    for request in mix.requests(vocabulary, run=repeats)[:2]:  # one alone takes other kernels than many
        run_offline(llm, [request])
    first, *others = mix.requests(vocabulary, run=repeats + 1)  # a prefix that no run before had
    cold = measure(llm, [first], ceilings).outcomes
    warm = [outcome for request in others for outcome in measure(llm, [request], ceilings).outcomes]
    limit = Limit(llm.model.footprint, llm.engine.max_batch, ceilings)
    middle = statistics.median_low(mix.lengths[1:] or mix.lengths)
    for how, outcomes, computed in ((ALONE, cold, len(first.prompt)), (REST, warm, middle)):
        # With one request there is no rest.
        if not (found := samples(outcomes, "ttft_ms")):
            absent = list_metrics(NAME, f"{name}: {how}", WITH_PREFIX[REST])
            rows.add_missing(absent, "there is no other request", **knobs)
            continue
        seconds, kind = limit.prompts([(computed, mix.prefix_tokens + computed if how == REST else computed)])
        least = None if seconds is None else seconds * 1e3
        case = f"{name}: {how}"
        add(rows, NAME, case, "ttft_ms", samples=found, limit=least, limit_kind=kind, **knobs)
        if how == REST:
            share = statistics.median(found) / cold[0].ttft_ms
            add(rows, NAME, case, "ttft_share", share, note="of the first request's", **knobs)
    for how, results in at_once.items():
        case = f"{name}: {how}"
        runs = [(result.outcomes, result.seconds) for result in results]
        floor = results[0].floor_s, results[0].floor_kind
        add_run(rows, NAME, case, runs, (*SPEEDS, "duration_s", "ttft_ms", "cached_tokens"), floor, **knobs)
        once = sum(mix.lengths) + mix.prefix_tokens * (1 if how == SHARED else mix.count)
        add(
            rows, NAME, case, "computed_tokens", samples=[result.computed_tokens for result in results],
            limit=float(once), limit_kind="each prompt's own tokens and the prefix once" if how == SHARED else "all",
            **knobs,
        )  # fmt: skip


PREFIX_CACHE = Suite(NAME, measure, "engine", rows, engine_knobs)
