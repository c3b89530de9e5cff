"""The standard suite, which every week and every other engine is measured by: its cases, its metrics, its limits.

Definitions: a call has B prompts of P random tokens and makes N tokens for each, eos ignored; tokenisation is out,
sampling (greedy) is in. ttft_ms: from the call to the first token. tpot_ms: (e2e - ttft) / (N - 1). itl_ms: between two
tokens. output_throughput: B * N new tokens over e2e. total_token_throughput: B * (P + N) over e2e.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from stages.metrics import Listed, Rows, read
from stages.params import Workload
from stages.stage import Run

if TYPE_CHECKING:
    from engine.model.cost import Ceilings, Footprint

PREFILL, DECODE = "standard_prefill", "standard_decode"
PROMPTS = "workload_prompts"  # the workload's own text instead of random tokens
NO_GPU = "no GPU on this host"
GENERATION = (
    "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "output_throughput", "total_token_throughput", "peak_memory_bytes",
)  # fmt: skip
METRICS = {PREFILL: ("ttft_ms", "peak_memory_bytes"), DECODE: GENERATION, PROMPTS: GENERATION}
UNITS = {
    "ttft_ms": ("ms", "lower"),
    "tpot_ms": ("ms", "lower"),
    "itl_ms": ("ms", "lower"),
    "e2e_ms": ("ms", "lower"),
    "output_throughput": ("tokens/s", "higher"),
    "total_token_throughput": ("tokens/s", "higher"),
    "peak_memory_bytes": ("B", "lower"),
}

# Prompts [B, P] of token ids, N -> seconds from the call to each of the N tokens (all sequences advance together).
Generate = Callable[[list[list[int]], int], list[float]]


@dataclass(frozen=True)
class Case:
    """One call: `batch` prompts of `prompt_tokens` random tokens, `new_tokens` made for each."""

    suite: str
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        if self.suite == PREFILL:
            return f"prefill {self.prompt_tokens}"
        if self.suite == PROMPTS:
            return f"prompts batch {self.batch}"
        return f"decode batch {self.batch} context {self.prompt_tokens}"

    @property
    def knobs(self) -> dict[str, int]:
        return {
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "context": self.prompt_tokens,
        }


def list_cases(workload: Workload, max_positions: int, suites: Iterable[str] = (PREFILL, DECODE)) -> list[Case]:
    """The cases of a workload that fit a model of `max_positions`, smallest first within a suite."""
    cases = []
    if PREFILL in suites:
        cases += [Case(PREFILL, 1, prompt, 1) for prompt in sorted(workload.prompt_tokens) if prompt < max_positions]
    if DECODE in suites:
        sizes = sorted((prompt, batch) for prompt in workload.prompt_tokens for batch in workload.batch_sizes)
        cases += [
            Case(DECODE, batch, prompt, workload.new_tokens)
            for prompt, batch in sorted(sizes, key=lambda size: (size[0] * size[1], size))
            if prompt + workload.new_tokens <= max_positions
        ]
    return cases


def random_prompts(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    """[B, P] token ids, uniform over the vocabulary, decided by `seed` and the case."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + case.batch * 65_537 + case.prompt_tokens)
    return torch.randint(0, vocab_size, (case.batch, case.prompt_tokens), generator=generator).tolist()


@dataclass
class Latency:
    """Samples of one case, one a run (`itl_ms`: one a token and run)."""

    ttft_ms: list[float] = field(default_factory=list)
    tpot_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    e2e_ms: list[float] = field(default_factory=list)
    output_throughput: list[float] = field(default_factory=list)
    total_token_throughput: list[float] = field(default_factory=list)
    peak_memory_bytes: list[float] = field(default_factory=list)

    def record(self, case: Case, seconds: list[float]) -> None:
        """Add one run's token times (seconds from the call, `case.new_tokens` of them, not falling)."""
        if len(seconds) != case.new_tokens:
            raise ValueError(f"{case.name}: {len(seconds)} token times where {case.new_tokens} tokens were asked for")
        end = seconds[-1]
        self.ttft_ms.append(seconds[0] * 1e3)
        self.e2e_ms.append(end * 1e3)
        self.itl_ms += [(after - before) * 1e3 for before, after in pairwise(seconds)]
        if case.new_tokens > 1:
            self.tpot_ms.append((end - seconds[0]) * 1e3 / (case.new_tokens - 1))
        self.output_throughput.append(case.batch * case.new_tokens / end)
        self.total_token_throughput.append(case.batch * (case.prompt_tokens + case.new_tokens) / end)


class TooSlow(RuntimeError):
    """A case was not run because its estimate is beyond what a stage may spend on one case."""


@dataclass
class Budget:
    """Seconds a case may take, and what was learnt so far of this engine's speed.

    A case is repeated `workload.repeats` times or until `case_seconds` are spent, but once at least, unless its
    estimate from smaller cases is over `ceiling_seconds`.
    """

    case_seconds: float
    ceiling_seconds: float = 30.0
    seconds_per_prompt_token: float = 0.0
    seconds_per_step: float = 0.0

    @classmethod
    def on(cls, device: str) -> Budget:
        """What a stage may spend: minutes in all, on two CPU cores with a small model and on a GPU with a large one."""
        return cls(case_seconds=5.0) if device == "cuda" else cls(case_seconds=3.0, ceiling_seconds=20.0)

    def estimate(self, case: Case) -> float:
        """Seconds one run should take, from the last case measured; 0 when nothing is known."""
        return case.batch * case.prompt_tokens * self.seconds_per_prompt_token + case.new_tokens * self.seconds_per_step

    def learn(self, case: Case, seconds: list[float]) -> None:
        self.seconds_per_prompt_token = seconds[0] / (case.batch * case.prompt_tokens)
        if case.new_tokens > 1:
            self.seconds_per_step = (seconds[-1] - seconds[0]) / (case.new_tokens - 1)


def measure_case(
    generate: Generate,
    case: Case,
    workload: Workload,
    vocab_size: int,
    device: str,
    budget: Budget,
    rehearse: bool = False,
) -> Latency:
    """Warm up, then the case's runs, each with other random prompts.

    rehearse: warm up by a whole run, as what makes plans for lengths that it has not seen needs it; then two at least.

    Raises TooSlow instead of running a case that would take more than the budget's ceiling.
    """
    import torch

    expected = budget.estimate(case)
    if expected > budget.ceiling_seconds:
        raise TooSlow(
            f"one run would take about {expected:.0f} s, over the {budget.ceiling_seconds:.0f} s a case may take"
        )
    latency = Latency()
    cuda = device == "cuda"
    # Two tokens reach every code path of a run: one prefill, one decode step.
    warm_tokens = case.new_tokens if rehearse else min(2, case.new_tokens)
    begin = time.perf_counter()
    for repeat in range(workload.warmup):
        if repeat and time.perf_counter() - begin > budget.case_seconds / 4:
            break
        generate(random_prompts(case, vocab_size, 1_000 + repeat), warm_tokens)
    if rehearse:
        begin = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for repeat in range(workload.repeats):
        if repeat > rehearse and time.perf_counter() - begin + budget.estimate(case) > budget.case_seconds:
            break
        seconds = generate(random_prompts(case, vocab_size, repeat), case.new_tokens)
        latency.record(case, seconds)
        budget.learn(case, seconds)
    if cuda:
        latency.peak_memory_bytes.append(float(torch.cuda.max_memory_allocated()))
    return latency


def read_ceilings(run: Run, gpu: bool) -> Ceilings:
    """The ceilings that the provision stage measured for the GPU, or for the CPU where `gpu` is False."""
    from engine.model.cost import Ceilings

    frame: Any = read(run.find("data/ceilings.parquet"))
    frame = frame[
        (frame["suite"] == "ceilings") & (frame["case"] == ("gpu" if gpu else "cpu")) & (frame["status"] == "ok")
    ]
    values = {row.metric: row for row in frame.itertuples()}
    bandwidth, rate = values.get("read_bandwidth"), values.get("matrix_rate")
    if bandwidth is None or rate is None:
        return Ceilings()
    return Ceilings(float(bandwidth.value), float(rate.value), str(rate.dtype))


def limits(case: Case, model: Footprint, ceilings: Ceilings) -> dict[str, tuple[float | None, str | None]]:
    """metric -> (the value it could have at best on this host, why)."""
    from engine.model.cost import step_cost

    prompts = [case.prompt_tokens] * case.batch
    first, first_kind = ceilings.milliseconds(step_cost(model, prompts, prompts))
    found: dict[str, tuple[float | None, str | None]] = {"ttft_ms": (first, first_kind)}
    if first is None or case.new_tokens < 2:
        return found
    # A step's cost grows linearly with its context, so the middle step's is the mean.
    middle = case.prompt_tokens + case.new_tokens // 2
    step, step_kind = ceilings.milliseconds(step_cost(model, [1] * case.batch, [middle] * case.batch))
    assert step is not None
    whole = first + step * (case.new_tokens - 1)
    why = f"first token: {first_kind}; each other: {step_kind}"
    found |= {
        "tpot_ms": (step, step_kind),
        "itl_ms": (step, step_kind),
        "e2e_ms": (whole, why),
        "output_throughput": (case.batch * case.new_tokens / whole * 1e3, why),
        "total_token_throughput": (case.batch * (case.prompt_tokens + case.new_tokens) / whole * 1e3, why),
    }
    return found


def describe_row(case: Case, metric: str) -> dict[str, Any]:
    """What a row of the case says whether or not it has a value."""
    unit, better = UNITS[metric]
    return {"suite": case.suite, "case": case.name, "metric": metric, "unit": unit, "better": better}


def add_latency(
    rows: Rows,
    case: Case,
    latency: Latency,
    bounds: dict[str, tuple[float | None, str | None]],
    no_memory: str | None,
    **knobs: Any,
) -> None:
    """One row a metric of the case's suite; `no_memory` says why there is no peak_memory_bytes, if there is none."""
    for metric in METRICS[case.suite]:
        shared = describe_row(case, metric)
        samples = getattr(latency, metric)
        if metric == "peak_memory_bytes" and no_memory is not None:
            rows.missing(**shared, reason=no_memory, **case.knobs, **knobs)
        elif samples:
            limit, kind = bounds.get(metric, (None, None))
            value = max(samples) if metric == "peak_memory_bytes" else median(samples)
            rows.add(**shared, value=value, samples=samples, limit=limit, limit_kind=kind, **case.knobs, **knobs)
        else:
            rows.missing(**shared, reason="needs two or more new tokens", **case.knobs, **knobs)


def list_rows(case: Case) -> list[Listed]:
    """The case's rows."""
    return [describe_row(case, metric) | case.knobs for metric in METRICS[case.suite]]
