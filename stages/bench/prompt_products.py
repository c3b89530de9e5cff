"""A prompt's matrix products, beside what torch (cuBLAS) takes for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.bench.context import Context
from stages.bench.prompts import COMPUTE_RATE, Case, Found, make_suite, rate

TOKENS = (128, 512, 2048, 4096, 8192)
PRODUCTS = ("qkv", "o", "gate_up", "down")
BEYOND_L2 = 256 << 20  # bytes of weights that a product goes through in turn


def bench_product(context: Context, case: Case) -> tuple[Found, str | None]:
    """A projection of the model on random tokens, with as many layers' weights in turn as do not fit the L2 cache.

    Of gate and up the engine computes SwiGLU too; torch the product alone.
    """
    import torch

    model, tokens = context.llm.model, case["prompt_tokens"]
    weights, device = model.weights, model.weights.device
    name = case["case"].partition(",")[0]
    first = getattr(weights.layers[0], name)
    count = 1 + min(8, BEYOND_L2 // first.nbytes) if device.type == "cuda" else 1
    matrices = [getattr(layer, name) for layer in weights.layers[:count]]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, first.in_features, generator=generator, device=device).to(weights.dtype)
    if case.get("backend") == "torch":
        held = [matrix.rows() for matrix in matrices]
        calls: list[Callable[[], Any]] = [lambda weight=weight: x @ weight.t() for weight in held]
    else:
        product = model.ops.linear_swiglu if name == "gate_up" else model.ops.linear
        calls = [lambda matrix=matrix: product(x, matrix) for matrix in matrices]
    return rate(context, calls, 2.0 * tokens * first.out_features * first.in_features, device), None


PROMPT_PRODUCTS = make_suite(
    "prompt_products",
    COMPUTE_RATE,
    [
        {"case": f"{name}, {tokens} tokens", "prompt_tokens": tokens} | other
        for name in PRODUCTS
        for tokens in TOKENS
        for other in ({}, {"backend": "torch"})
    ],
    bench_product,
)
