"""Prompts of several lengths through a week's engine: time to the first token, how far from the limit, and memory.

One prompt at a time, of random tokens, in pieces as the engine takes them, until the logits of its last token.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from stages.bench.context import Context
from stages.bench.prompts import Case, Found, make_suite

if TYPE_CHECKING:
    from engine.model.transformer import Model

TOKENS = (128, 512, 1024, 2048, 4000, 8192, 16384, 32768)
UNITS = {
    "ttft_ms": ("ms", "lower"),
    "prompt_throughput": ("tokens/s", "higher"),
    "compute_rate": ("FLOP/s", "higher"),
    "activation_bytes": ("B", "lower"),
}


def bench_length(context: Context, case: Case) -> tuple[Found, str | None]:
    longer, note = stretch(context.llm.model, case["prompt_tokens"])
    return time_prompt(context, longer, case["prompt_tokens"]), note


def stretch(model: Model, tokens: int) -> tuple[Model, str | None]:
    """The model with linear RoPE scaling (arXiv:2306.15595) to `tokens` positions, and a note that says so; as it is
    where it has them, and where its attention reads a whole row of scores, which so many take minutes for."""
    from engine.model.transformer import Model as Made
    from engine.ops.batch import TokenSpan

    config = model.config
    if tokens <= model.max_positions:
        return model, None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if model.ops.plan([TokenSpan(1, 0, 0)], model.weights.dtype, heads, kv_heads, config.head_dim) is None:
        return model, None
    factor = tokens / config.max_position_embeddings
    rope, sliding = (
        dataclasses.replace(given, type="linear", factor=factor) for given in (config.rope, config.sliding_rope)
    )
    longer = dataclasses.replace(config, max_position_embeddings=tokens, rope=rope, sliding_rope=sliding)
    return Made(longer, model.weights, model.ops), f"beyond the model's positions: RoPE scaled by {factor:g}"


def time_prompt(context: Context, model: Model, tokens: int) -> Found:
    """The rows of a prompt of so many tokens through `model`. Raises TooLarge."""
    import torch

    from engine.bench import latency
    from engine.bench.latency import PAGE, case_cost
    from engine.model.cost import kv_bytes_per_token

    gpu, before = model.weights.device.type == "cuda", 0
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    case, engine = latency.Case(prompt=tokens, new=0, depth=0), context.llm.engine
    repeats, ceilings = context.workload.repeats, context.ceilings
    result = latency.measure(model, case, 1, repeats, engine.captures, engine.step_tokens, ceilings)
    flops = case_cost(model.footprint, case, 1)[0].flops
    limit, kind = result.limit, result.limit_kind
    found: Found = {
        "ttft_ms": ([sample * 1e3 for sample in result.samples], None if limit is None else limit * 1e3, kind),
        "prompt_throughput": (result.rates, None if limit is None else tokens / limit, kind),
        "compute_rate": ([flops / s for s in result.samples], None if limit is None else flops / limit, kind),
    }
    if gpu:
        capacity = min(-(-tokens // PAGE) * PAGE, model.max_positions)
        cache = capacity * kv_bytes_per_token(model.config, model.weights.dtype)
        found["activation_bytes"] = ([float(torch.cuda.max_memory_allocated() - before - cache)], None, None)
    return found


PROMPT_LENGTHS = make_suite(
    "prompt_lengths",
    UNITS,
    [{"case": f"{tokens} tokens", "batch": 1, "prompt_tokens": tokens} for tokens in TOKENS],
    bench_length,
)
