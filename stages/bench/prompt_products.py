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
    """A projection of the model on random tokens and weights, as many of these in turn as do not fit the L2 cache.

    Of gate and up the engine computes SwiGLU too; torch the product alone.
    """
    import torch

    model, tokens = context.llm.model, case["prompt_tokens"]
    config, weights = model.config, model.weights
    name = case["case"].partition(",")[0]
    layer = weights.layers[0]
    rows, depth = getattr(layer, name).shape
    device, dtype = weights.device, weights.dtype
    generator = torch.Generator(device).manual_seed(0)

    def random(count: int) -> Any:
        return torch.randn(count, depth, generator=generator, device=device).to(dtype)

    x = random(tokens)
    matrices = [random(rows) * config.hidden_size**-0.5]
    if device.type == "cuda":
        matrices += [matrices[0].clone() for _ in range(min(8, BEYOND_L2 // matrices[0].nbytes))]
    if case.get("backend") == "torch":
        run: Callable[[Any], Any] = lambda matrix: x @ matrix.t()  # noqa: E731
    else:
        product = model.ops.linear_swiglu if name == "gate_up" else model.ops.linear
        run = lambda matrix: product(x, matrix)  # noqa: E731
    calls = [lambda m=matrix: run(m) for matrix in matrices]
    return rate(context, calls, 2.0 * tokens * rows * depth, device), None


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
