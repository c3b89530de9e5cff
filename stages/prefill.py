"""Prompts of several lengths through a week's engine: time to the first token, how far from the limit, and memory.

One prompt at a time, of random tokens, in pieces as the engine takes them, until the logits of its last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.metrics import Rows
from stages.params import Workload

if TYPE_CHECKING:
    from engine.cost import Ceilings
    from engine.model import Model

LENGTHS = "prompt_lengths"
TOKENS = (128, 512, 1024, 2048, 4000)
# metric -> unit, better
METRICS: dict[str, tuple[str, str]] = {
    "ttft_ms": ("ms", "lower"),
    "prompt_throughput": ("tokens/s", "higher"),
    "compute_rate": ("FLOP/s", "higher"),
    "activation_bytes": ("B", "lower"),
}


def name_case(tokens: int) -> str:
    return f"{tokens} tokens"


def add_missing(rows: Rows, reason: str, lengths: tuple[int, ...] = TOKENS, **knobs: Any) -> None:
    """The suite's rows of these lengths without values, saying why."""
    for tokens in lengths:
        for metric, (unit, better) in METRICS.items():
            rows.missing(
                suite=LENGTHS, case=name_case(tokens), metric=metric, unit=unit, better=better, reason=reason, batch=1,
                prompt_tokens=tokens, **knobs,
            )  # fmt: skip


def bench(
    rows: Rows, model: Model, workload: Workload, ceilings: Ceilings, chunk: int, graph: bool, **knobs: Any
) -> None:  # fmt: skip
    """The suite's rows. A length beyond the model's positions is a row that says so.

    chunk: tokens of a pass at most. graph: whether short prompts are CUDA graphs.
    """
    import torch

    from engine.cost import kv_bytes_per_token
    from engine.latency import PAGE, Case, TooLarge, case_cost, measure

    gpu = model.weights.device.type == "cuda"
    for tokens in TOKENS:
        case = Case(prompt=tokens, new=0, depth=0)
        before = 0
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            result = measure(model, case, 1, workload.repeats, graph, chunk, ceilings)
        except TooLarge as reason:
            add_missing(rows, str(reason), (tokens,), **knobs)
            continue
        cost, _ = case_cost(model.config, model.weights.dtype, case, 1)
        capacity = min(-(-tokens // PAGE) * PAGE, model.max_positions)
        cache = capacity * kv_bytes_per_token(model.config, model.weights.dtype)
        limit, kind = result.limit, result.limit_kind
        found: dict[str, tuple[list[float], float | None]] = {
            "ttft_ms": ([sample * 1e3 for sample in result.samples], None if limit is None else limit * 1e3),
            "prompt_throughput": (result.rates, None if limit is None else tokens / limit),
            "compute_rate": (
                [cost.flops / sample for sample in result.samples], None if limit is None else cost.flops / limit
            ),
        }  # fmt: skip
        if gpu:
            found["activation_bytes"] = ([float(torch.cuda.max_memory_allocated() - before - cache)], None)
        for metric, (samples, best) in found.items():
            unit, better = METRICS[metric]
            rows.add(
                suite=LENGTHS, case=name_case(tokens), metric=metric, value=None, samples=samples, unit=unit,
                better=better, limit=best, limit_kind=None if best is None else kind, batch=1, prompt_tokens=tokens,
                **knobs,
            )  # fmt: skip
