"""Parts that the suites of many requests share: their rows, and runs of the same requests as rows.

Prompts are random tokens, other ones in every run, so that no prefix cache knows them from the run before; greedy, to
the number of tokens that the workload says. Text is left out: the engine has no tokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.bench.workloads import LATENCIES, Mix, Outcome, SampleRequest, describe, samples
from stages.bench.context import Context
from stages.metrics import Listed, Rows
from stages.standard import TooSlow

if TYPE_CHECKING:
    from engine.bench import throughput
    from engine.llm import LLM

CPU_SECONDS = 600.0  # that a run may take there by its estimate

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


def name_mix(mix: Mix) -> str:
    """As "256 requests of 32 to 1024 tokens, 128 new", or with what all begin with."""
    own = f"{mix.low} to {mix.high}" if mix.low < mix.high else str(mix.low)
    shared = f"{mix.prefix_tokens} shared and " if mix.prefix_tokens else ""
    return f"{mix.count} requests of {shared}{own} tokens, {mix.new_tokens} new"


def mix_knobs(mix: Mix) -> dict[str, Any]:
    """Knobs of a mix, as far as rows have them; prompts of many lengths have none."""
    return {
        "batch": mix.count,
        "new_tokens": mix.new_tokens,
        "prompt_tokens": mix.prefix_tokens + mix.low if mix.low == mix.high else None,
    }


def read_requests(context: Context) -> Mix:
    """The requests of the workload."""
    many = context.workload.requests
    return Mix(many.count, *many.prompt_tokens, many.new_tokens, many.seed)


def list_metrics(suite: str, case: str, metrics: Iterable[str], **knobs: Any) -> list[Listed]:
    """A case's rows."""
    return [
        {"suite": suite, "case": case, "metric": metric, "unit": UNITS[metric][0], "better": UNITS[metric][1]} | knobs
        for metric in metrics
    ]


def add(rows: Rows, suite: str, case: str, metric: str, value: float | None = None, **fields: Any) -> None:
    unit, better = UNITS[metric]
    rows.add(suite=suite, case=case, metric=metric, value=value, unit=unit, better=better, **fields)


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
                reason = "no request was completed" if kinds else "needs two or more new tokens"
                rows.add_missing(list_metrics(suite, case, (metric,)), reason, **knobs)


def split_name(metric: str) -> tuple[str, str]:
    """ "ttft_ms_p90" as ("ttft_ms", "_p90")."""
    latency = next(name for name in LATENCIES if metric.startswith(name))
    return latency, metric.removeprefix(latency)


def check(llm: LLM, mix: Mix) -> None:
    """Raises ValueError for requests the model is not for, TooSlow for a CPU that would take too long."""
    from engine.bench.throughput import run_offline

    if mix.longest > llm.max_model_len:
        raise ValueError(f"a request of {mix.longest} tokens, prompt and new ones; the model has {llm.max_model_len}")
    if llm.engine.device == "cuda":
        return
    run_offline(llm, [SampleRequest([1], 1)])
    tokens = 8
    _, seconds = run_offline(llm, [SampleRequest([0] * tokens, 2)])
    total = sum(mix.lengths) + mix.count * (mix.prefix_tokens + mix.new_tokens)
    expected = seconds / (tokens + 2) * total
    if expected > CPU_SECONDS:
        raise TooSlow(f"one run would take about {expected:.0f} s, over the {CPU_SECONDS:.0f} s a case may take")


def repeat(context: Context, mix: Mix) -> list[throughput.ThroughputResult]:
    """Runs of the mix after one to warm up; on a CPU no more are begun once the first have taken CPU_SECONDS / 10."""
    from engine.bench.throughput import measure, warm_up

    llm = context.llm
    requests = mix.requests(llm.config.vocab_size)
    gpu = llm.engine.device == "cuda"
    # A CPU has no graphs to capture.
    warm_up(llm, requests if gpu else [replace(requests[0], new_tokens=1)])
    results, begin = [], time.perf_counter()
    for run in range(context.workload.repeats):
        if run and not gpu and time.perf_counter() - begin > CPU_SECONDS / 10:
            break
        results.append(measure(llm, mix.requests(llm.config.vocab_size, run), context.ceilings))
    return results
