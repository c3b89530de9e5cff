"""Prompts of several lengths through a week's engine: time to the first token, how far from the limit, and memory; and
what prompts are made of, matrix products and attention, beside what torch takes for the same.

One prompt at a time, of random tokens, in pieces as the engine takes them, until the logits of its last token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stages.decode import Part, time_part
from stages.metrics import Rows
from stages.params import Workload

if TYPE_CHECKING:
    from engine.model.cost import Ceilings
    from engine.model.transformer import Model

LENGTHS, PRODUCTS, ATTENTION = "prompt_lengths", "prompt_products", "prompt_attention"
SUITES = (LENGTHS, PRODUCTS, ATTENTION)
TOKENS = (128, 512, 1024, 2048, 4000, 8192, 16384, 32768)
PRODUCT_TOKENS = (128, 512, 2048, 4096, 8192)
PRODUCT_NAMES = ("qkv", "o", "gate_up", "down")
# Sequences, tokens of each: one alone, and as many as make 16,384 tokens.
ATTENTION_SIZES = (
    (1, 512), (1, 1024), (1, 2048), (1, 4096), (32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384),
)  # fmt: skip
PEERS = {"cudnn": "CUDNN_ATTENTION", "flash_attention_2": "FLASH_ATTENTION"}
PORTABLE = "portable"  # our attention as GPUs without an implementation of their own run it
BEYOND_L2 = 256 << 20  # bytes of weights that a product goes through in turn
# suite -> metric -> unit, better
METRICS: dict[str, dict[str, tuple[str, str]]] = {
    LENGTHS: {
        "ttft_ms": ("ms", "lower"),
        "prompt_throughput": ("tokens/s", "higher"),
        "compute_rate": ("FLOP/s", "higher"),
        "activation_bytes": ("B", "lower"),
    },
    PRODUCTS: {"compute_rate": ("FLOP/s", "higher")},
    ATTENTION: {"compute_rate": ("FLOP/s", "higher")},
}
BY_MATRIX = "rate of a large matrix product"


def list_cases(suite: str) -> list[dict[str, Any]]:
    """What names the rows of each case of a suite; a backend only where it is not the week's."""
    if suite == LENGTHS:
        return [{"case": f"{tokens} tokens", "batch": 1, "prompt_tokens": tokens} for tokens in TOKENS]
    if suite == PRODUCTS:
        return [
            {"case": f"{name}, {tokens} tokens", "prompt_tokens": tokens} | other
            for name in PRODUCT_NAMES
            for tokens in PRODUCT_TOKENS
            for other in ({}, {"backend": "torch"})
        ]
    return [
        {"case": f"{batch} x {tokens} tokens", "batch": batch, "prompt_tokens": tokens} | other
        for batch, tokens in ATTENTION_SIZES
        for other in ({}, *({"backend": name} for name in (PORTABLE, *PEERS)))
    ]


def units(suite: str, metric: str) -> dict[str, str]:
    unit, better = METRICS[suite][metric]
    return {"suite": suite, "metric": metric, "unit": unit, "better": better}


def add_missing(
    rows: Rows, suite: str, reason: str, cases: Sequence[dict[str, Any]] | None = None, **knobs: Any
) -> None:  # fmt: skip
    """The suite's rows, or those of `cases`, without values, saying why."""
    for case in list_cases(suite) if cases is None else cases:
        for metric in METRICS[suite]:
            rows.missing(reason=reason, **knobs | case | units(suite, metric))


def bench(
    suite: str, rows: Rows, model: Model, workload: Workload, ceilings: Ceilings, chunk: int, graph: bool, **knobs: Any
) -> None:
    """The suite's rows. What the model's positions or the machine do not hold is a row that says so.

    chunk: tokens of a pass at most. graph: whether short prompts are CUDA graphs.
    """
    from engine.bench.latency import TooLarge

    for case in list_cases(suite):
        note = None
        try:
            if suite == LENGTHS:
                longer, note = stretch(model, case["prompt_tokens"])
                found = time_prompt(longer, workload, ceilings, chunk, graph, case["prompt_tokens"])
            elif suite == PRODUCTS:
                found = time_product(model, workload, ceilings, **case)
            else:
                found = time_attention(model, workload, ceilings, **case)
        except TooLarge as reason:
            add_missing(rows, suite, str(reason), [case], **knobs)
            continue
        for metric, (samples, limit, kind) in found.items():
            shared: dict[str, Any] = knobs | case | units(suite, metric)
            rows.add(value=None, samples=samples, limit=limit, limit_kind=kind, note=note, **shared)


def stretch(model: Model, tokens: int) -> tuple[Model, str | None]:
    """The model with linear RoPE scaling (arXiv:2306.15595) to `tokens` positions, and a note that says so; as it is
    where it has them, and where its attention reads a whole row of scores, which so many take minutes for."""
    from engine.model.transformer import Model as Made
    from engine.ops.reference import Run

    config = model.config
    if tokens <= model.max_positions:
        return model, None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if model.ops.plan([Run(1, 0, 0)], model.weights.dtype, heads, kv_heads, config.head_dim) is None:
        return model, None
    factor = tokens / config.max_position_embeddings
    rope, sliding = (
        dataclasses.replace(given, type="linear", factor=factor) for given in (config.rope, config.sliding_rope)
    )
    longer = dataclasses.replace(config, max_position_embeddings=tokens, rope=rope, sliding_rope=sliding)
    return Made(longer, model.weights, model.ops), f"beyond the model's positions: RoPE scaled by {factor:g}"


Found = dict[str, tuple[list[float], float | None, str | None]]  # metric: samples, limit, kind of limit


def time_prompt(
    model: Model, workload: Workload, ceilings: Ceilings, chunk: int, graph: bool, tokens: int
) -> Found:  # fmt: skip
    """Raises TooLarge."""
    import torch

    from engine.bench.latency import PAGE, Case, case_cost, measure
    from engine.model.cost import kv_bytes_per_token

    gpu, before = model.weights.device.type == "cuda", 0
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    case = Case(prompt=tokens, new=0, depth=0)
    result = measure(model, case, 1, workload.repeats, graph, chunk, ceilings)
    flops = case_cost(model.config, model.weights.dtype, case, 1)[0].flops
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


def time_product(
    model: Model, workload: Workload, ceilings: Ceilings, case: str, prompt_tokens: int, backend: str | None = None
) -> Found:
    """A projection of the model on random tokens and weights, as many of these in turn as do not fit the L2 cache.

    Of gate and up the engine computes SwiGLU too; torch the product alone.
    """
    import torch

    config, weights = model.config, model.weights
    name = case.partition(",")[0]
    layer = weights.layers[0]
    rows, depth = getattr(layer, name).shape
    device, dtype = weights.device, weights.dtype
    generator = torch.Generator(device).manual_seed(0)

    def random(count: int) -> Any:
        return torch.randn(count, depth, generator=generator, device=device).to(dtype)

    x = random(prompt_tokens)
    matrices = [random(rows) * config.hidden_size**-0.5]
    if device.type == "cuda":
        matrices += [matrices[0].clone() for _ in range(min(8, BEYOND_L2 // matrices[0].nbytes))]
    if backend == "torch":
        run: Callable[[Any], Any] = lambda matrix: x @ matrix.t()  # noqa: E731
    else:
        product = model.ops.linear_swiglu if name == "gate_up" else model.ops.linear
        run = lambda matrix: product(x, matrix)  # noqa: E731
    return rated([lambda m=matrix: run(m) for matrix in matrices], 2.0 * prompt_tokens * rows * depth, workload,
                 ceilings, device)  # fmt: skip


def time_attention(
    model: Model, workload: Workload, ceilings: Ceilings, case: str, batch: int, prompt_tokens: int,
    backend: str | None = None,
) -> Found:  # fmt: skip
    """Causal attention of whole prompts, ours over a cache that holds them, torch's over contiguous tensors.

    Raises TooLarge where the week's engine or this torch has no such kernel.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from engine.bench.latency import TooLarge
    from engine.ops.reference import Run

    config, device, dtype = model.config, model.weights.device, model.weights.dtype
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    keys, values = (random(batch, kv_heads, prompt_tokens, width) for _ in range(2))
    scale, flops = width**-0.5, 2.0 * batch * heads * prompt_tokens * (prompt_tokens + 1) * width
    if backend in (None, PORTABLE):
        from kernels.attention import prefill
        from kernels.launch import machine_of

        runs = [Run(prompt_tokens, slot, 0) for slot in range(batch)]
        plan, tiling = model.ops.plan(runs, dtype, heads, kv_heads, width), None
        if plan is None:
            raise TooLarge("this engine has no kernel for the prompts' attention alone")
        if backend == PORTABLE:
            tiling = prefill.Tiling.of_warps(width, machine_of(device.index or 0)[0])
            plan = prefill.plan(runs, width, device, tiling)
        q = random(batch * prompt_tokens, heads, width)
        cache, out = (keys.transpose(1, 2), values.transpose(1, 2)), torch.empty_like(q)
        run: Callable[[], Any] = lambda: prefill.attention(q, *cache, plan, scale, 0, out, None, tiling)  # noqa: E731
        return rated([run], flops, workload, ceilings, device)
    query = random(batch, heads, prompt_tokens, width)
    shared = {"is_causal": True, "scale": scale, "enable_gqa": heads != kv_heads}

    def run_torch() -> Any:
        with sdpa_kernel(getattr(SDPBackend, PEERS[backend])):
            return scaled_dot_product_attention(query, keys, values, **shared)

    try:
        run_torch()
    except RuntimeError as error:
        raise TooLarge(f"torch on {device.type}: {str(error).partition(chr(10))[0]}") from None
    return rated([run_torch], flops, workload, ceilings, device)


def rated(
    calls: Sequence[Callable[[], Any]], flops: float, workload: Workload, ceilings: Ceilings, device: Any
) -> Found:  # fmt: skip
    """FLOP/s of the calls, one after another."""
    import torch

    with torch.inference_mode():
        samples = time_part(Part("", list(calls), 0), workload.repeats, device)
    rates = [len(calls) * flops / (sample / 1e3) for sample in samples]
    limit = ceilings.matrix_rate
    return {"compute_rate": (rates, limit, None if limit is None else BY_MATRIX)}
