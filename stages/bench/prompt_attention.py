"""A prompt's attention, in our own versions, beside what torch takes for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.bench.context import Context
from stages.bench.prompts import COMPUTE_RATE, Case, Found, make_suite, rate

# Sequences, tokens of each: one alone, and as many as make 16,384 tokens.
SIZES = (
    (1, 512), (1, 1024), (1, 2048), (1, 4096), (32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384),
)  # fmt: skip
PEERS = {"cudnn": "CUDNN_ATTENTION", "flash_attention_2": "FLASH_ATTENTION"}
PORTABLE = "portable"  # our attention as GPUs without an implementation of their own run it


def bench_attention(context: Context, case: Case) -> tuple[Found, str | None]:
    """Causal attention of whole prompts, ours over a cache that holds them, torch's over contiguous tensors.

    Raises TooLarge where the week's engine or this torch has no such kernel.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from engine.bench.latency import TooLarge
    from engine.ops.batch import TokenSpan

    model, backend = context.llm.model, case.get("backend")
    batch, prompt_tokens = case["batch"], case["prompt_tokens"]
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

        spans = [TokenSpan(prompt_tokens, slot, 0) for slot in range(batch)]
        plan, tiling = model.ops.plan(spans, dtype, heads, kv_heads, width), None
        if plan is None:
            raise TooLarge("this engine has no kernel for the prompts' attention alone")
        if backend == PORTABLE:
            tiling = prefill.Tiling.of_warps(width, machine_of(device.index or 0)[0])
            plan = prefill.plan(spans, width, device, tiling)
        q = random(batch * prompt_tokens, heads, width)
        cache, out = (keys.transpose(1, 2), values.transpose(1, 2)), torch.empty_like(q)
        run: Callable[[], Any] = lambda: prefill.attention(q, *cache, plan, scale, 0, out, None, tiling)  # noqa: E731
        return rate(context, [run], flops, device), None
    query = random(batch, heads, prompt_tokens, width)
    shared = {"is_causal": True, "scale": scale, "enable_gqa": heads != kv_heads}

    def run_torch() -> Any:
        with sdpa_kernel(getattr(SDPBackend, PEERS[backend])):
            return scaled_dot_product_attention(query, keys, values, **shared)

    try:
        run_torch()
    except RuntimeError as error:
        raise TooLarge(f"torch on {device.type}: {str(error).partition(chr(10))[0]}") from None
    return rate(context, [run_torch], flops, device), None


PROMPT_ATTENTION = make_suite(
    "prompt_attention",
    COMPUTE_RATE,
    [
        {"case": f"{batch} x {tokens} tokens", "batch": batch, "prompt_tokens": tokens} | other
        for batch, tokens in SIZES
        for other in ({}, *({"backend": name} for name in (PORTABLE, *PEERS)))
    ],
    bench_attention,
)
