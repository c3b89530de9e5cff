"""What others take for the same work, in the same run: cuBLAS for each matrix product, transformers compiled by torch.

transformers without compilation is w01's. Each product runs over all layers' weights in a row, as in `kernels`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.bench.context import Context
from stages.bench.kernels import Part, time_calls
from stages.bench.suite import Suite
from stages.metrics import Listed

if TYPE_CHECKING:
    from engine.model.weights import Weights

PRODUCT_BATCHES = (1, 8, 32, 128)
STEP_CASES = ((1, 128), (8, 128))
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
COMPILED = "static cache, torch.compile(mode='reduce-overhead')"


def rows(context: Context, gpu: bool) -> list[Listed]:
    products = [
        {"case": f"{name}, batch {batch}", "metric": "call_us", "unit": "µs", "batch": batch, "backend": "torch"}
        for batch in PRODUCT_BATCHES
        for name in PRODUCTS
    ]
    steps = [
        {
            "case": f"batch {batch} context {length}", "metric": "step_ms", "unit": "ms", "batch": batch,
            "context": length, "backend": "transformers",
        }
        for batch, length in STEP_CASES
    ]  # fmt: skip
    return [{"suite": "peers", "better": "lower"} | row for row in (*products, *steps)]


def knobs(context: Context) -> dict[str, Any]:
    return {"dtype": context.settings["dtype"], "tensor_parallel": 1}


def measure(context: Context) -> None:
    """Adds the rows, on a GPU and on the weights that the week's engine has loaded."""
    import torch

    from engine.bench.latency import Case, case_cost
    from engine.model.cost import Footprint
    from stages.hf import load_model

    context.llm.release()
    weights, workload, ceilings = context.llm.weights, context.workload, context.ceilings
    model: Any = None
    for row in rows(context, gpu=True):
        shared: dict[str, Any] = {"value": None} | knobs(context) | dict(row)
        if row["metric"] == "call_us":
            with torch.inference_mode():
                part = product(weights, row["case"].partition(",")[0], row["batch"])
                samples, limit, kind = time_calls(part, workload.repeats, ceilings, weights.device)
            context.rows.add(samples=samples, limit=limit, limit_kind=kind, **shared)
            continue
        model = load_model(context.path, weights.dtype, weights.device.type) if model is None else model
        steps = time_steps(model, row["batch"], row["context"], workload.new_tokens, torch.compile)
        case = Case(0, workload.new_tokens, row["context"])
        cost, _ = case_cost(Footprint.dense(context.config, weights.dtype), case, row["batch"])
        limit, kind = ceilings.milliseconds(cost)
        context.rows.add(samples=steps, limit=limit, limit_kind=kind, note=COMPILED, **shared)


def product(weights: Weights, name: str, batch: int) -> Part:
    """All layers' products of this name as torch computes them: a vector's by torch.mv."""
    import torch

    held = [weights.lm_head] if name == "head" else [getattr(layer, name) for layer in weights.layers]
    matrices = [matrix.rows() for matrix in held]
    rows, depth = matrices[0].shape
    x = torch.randn(batch, depth, device=weights.device).to(weights.dtype)
    run: Callable[[Any], Any] = (lambda w: torch.mv(w, x[0])) if batch == 1 else (lambda w: x @ w.t())
    size = len(matrices) * (matrices[0].numel() + batch * (rows + depth)) * weights.dtype.itemsize
    return Part(name, [lambda matrix=matrix: run(matrix) for matrix in matrices], size)


def time_steps(
    model: Any, batch: int, context: int, steps: int, compiler: Callable[..., Any] | None
) -> list[float]:  # fmt: skip
    """Milliseconds of each of `steps` greedy decode steps of transformers over a static cache, after one to warm up.

    compiler: torch.compile, or None to run the model as it is. The clock is read when a step's work is done.
    """
    import torch
    from transformers import StaticCache

    forward = model.forward if compiler is None else compiler(model.forward, mode="reduce-overhead", fullgraph=True)
    device, times = model.device, []
    with torch.no_grad():
        for _ in range(2):
            cache = StaticCache(config=model.config, max_cache_len=context + steps)
            ids = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
            first = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, times = first.logits[:, -1:].argmax(-1), []
            for step in range(steps):
                place = torch.full((batch, 1), context + step, device=device)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                done = forward(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True)
                token = done.logits[:, -1:].argmax(-1)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) * 1e3)
    return times


PEERS = Suite("peers", measure, "gpu", rows, knobs)
