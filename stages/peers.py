"""What others take for the same work, in the same run: cuBLAS for each matrix product, transformers compiled by torch.

transformers without compilation is w01's. Each product runs over all layers' weights in a row, as in `stages.decode`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.decode import Part, time_calls
from stages.metrics import Rows
from stages.params import Workload

if TYPE_CHECKING:
    from engine.model.config import ModelConfig
    from engine.model.cost import Ceilings
    from engine.model.weights import Weights

PEERS = "peers"
PRODUCT_BATCHES = (1, 8, 32, 128)
STEP_CASES = ((1, 128), (8, 128))
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
COMPILED = "static cache, torch.compile(mode='reduce-overhead')"


def list_rows() -> list[tuple[dict[str, Any], str]]:
    """(what names a row, metric) of the suite."""
    products = [
        ({"case": f"{name}, batch {batch}", "batch": batch, "backend": "torch"}, "call_us")
        for batch in PRODUCT_BATCHES
        for name in PRODUCTS
    ]
    steps = [
        ({"case": f"batch {batch} context {context}", "batch": batch, "context": context, "backend": "transformers"},
         "step_ms")
        for batch, context in STEP_CASES
    ]  # fmt: skip
    return products + steps


def units(metric: str) -> dict[str, str]:
    return {"metric": metric, "unit": "µs" if metric == "call_us" else "ms", "better": "lower"}


def add_missing(rows: Rows, reason: str, **knobs: Any) -> None:
    """The suite's rows without values, saying why."""
    for name, metric in list_rows():
        rows.missing(suite=PEERS, reason=reason, **knobs, **name, **units(metric))


def bench(
    rows: Rows, path: Path, config: ModelConfig, weights: Weights, workload: Workload, ceilings: Ceilings, **knobs: Any
) -> None:
    """The suite's rows, on a GPU. path: the checkpoint's folder. knobs: dtype and the like, of every row."""
    import torch

    from engine.bench.latency import Case, case_cost
    from stages.hf import load_model

    model: Any = None
    for name, metric in list_rows():
        shared: dict[str, Any] = {"suite": PEERS, "value": None} | knobs | name | units(metric)
        if metric == "call_us":
            with torch.inference_mode():
                part = product(weights, name["case"].partition(",")[0], name["batch"])
                samples, limit, kind = time_calls(part, workload.repeats, ceilings, weights.device)
            rows.add(samples=samples, limit=limit, limit_kind=kind, **shared)
            continue
        model = load_model(path, weights.dtype, weights.device.type) if model is None else model
        batch, context = name["batch"], name["context"]
        steps = time_steps(model, batch, context, workload.new_tokens, torch.compile)
        cost, _ = case_cost(config, weights.dtype, Case(0, workload.new_tokens, context), batch)
        limit, kind = ceilings.milliseconds(cost)
        rows.add(samples=steps, limit=limit, limit_kind=kind, note=COMPILED, **shared)


def product(weights: Weights, name: str, batch: int) -> Part:
    """All layers' products of this name as torch computes them: a vector's by torch.mv."""
    import torch

    matrices = [weights.lm_head] if name == "head" else [getattr(layer, name) for layer in weights.layers]
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
