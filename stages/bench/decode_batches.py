"""Decode steps of large batches, as the engine runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.bench.context import Context
from stages.bench.requests import add, list_metrics
from stages.bench.suite import Suite, engine_knobs
from stages.metrics import Listed

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.model.kv_cache import KVCache

NAME = "decode_batches"
BATCHES = ((64, 1024), (256, 512), (256, 1024))  # batch, context
SMALL = ((8, 64),)  # where there is no GPU


def list_sizes(gpu: bool) -> dict[tuple[int, int], list[Listed]]:
    """(batch, context) → its rows."""
    return {
        (batch, context): list_metrics(
            NAME, f"batch {batch} context {context}", ("step_ms", "output_throughput"), batch=batch, context=context
        )
        for batch, context in (BATCHES if gpu else SMALL)
    }


def rows(context: Context, gpu: bool) -> list[Listed]:
    return [row for listed in list_sizes(gpu).values() for row in listed]


def measure(context: Context) -> None:
    """Adds the rows of decode steps of many sequences at one context, on a cache of random numbers."""
    from engine.bench.latency import Case, LatencyResult, TooLarge, case_cost

    llm, new, rows = context.llm, context.workload.new_tokens, context.rows
    llm.release()  # a cache of our own takes the place of the engine's
    for (batch, length), listed in list_sizes(context.gpu).items():
        try:
            spent = time_steps(llm, batch, length, new, context.workload.repeats)
        except TooLarge as reason:
            rows.add_missing(listed, str(reason), **context.knobs)
            continue
        case = Case(prompt=0, new=new, depth=length)
        cost, steps = case_cost(llm.model.footprint, case, batch)
        limit, kind = context.ceilings.milliseconds(cost)
        rates = LatencyResult(case, batch, spent, steps, limit, kind).rates
        name, best = listed[0]["case"], None if limit is None else batch / limit * 1e3
        shared: dict[str, Any] = context.knobs | {"batch": batch, "context": length, "limit_kind": kind}
        add(rows, NAME, name, "step_ms", samples=[s / steps * 1e3 for s in spent], limit=limit, **shared)
        add(rows, NAME, name, "output_throughput", samples=rates, limit=best, **shared)


def time_steps(llm: LLM, batch: int, context: int, steps: int, repeats: int) -> list[float]:
    """Seconds of each run of `steps` decode steps after `context` tokens, after a short one. Raises TooLarge."""
    from engine.bench.latency import run_decode, seconds, start_decode
    from engine.runtime.decode_loop import DecodeLoop

    loop = DecodeLoop(llm.model, random_cache(llm, batch, context + steps), llm.engine.captures)
    spent = []
    for run in range(repeats + 1):
        start_decode(loop, batch, context)
        if run == 0:
            run_decode(loop, min(steps, 3))
        else:
            spent.append(seconds(lambda: run_decode(loop, steps), llm.weights.device))
    return spent


def random_cache(llm: LLM, batch: int, positions: int) -> KVCache:
    """A cache of random numbers, of the kind that the engine uses; paged, with each sequence's pages anywhere.

    Raises:
        TooLarge: The model has fewer positions, or the GPU less free memory.
    """
    import random

    import torch

    from engine.bench import latency
    from engine.model.cost import kv_bytes_per_token

    model = llm.model
    if llm.engine.kv_cache != "paged":
        return latency.random_cache(model, batch, positions)
    if positions > model.max_positions:
        raise latency.TooLarge(f"{positions} positions; the model has {model.max_positions}")
    width = -(-positions // llm.engine.page_size)
    device = model.weights.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        size = batch * width * llm.engine.page_size * kv_bytes_per_token(model.config, model.weights.dtype)
        free = torch.cuda.mem_get_info(device)[0]
        if size > 0.9 * free:
            raise latency.TooLarge(f"a cache of {size / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free")
    cache = model.new_paged_cache(
        pages=batch * width, slots=batch, capacity=positions, page_size=llm.engine.page_size
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*cache.k, *cache.v):
        tensor.normal_(generator=generator)
    pages = random.Random(0).sample(range(batch * width), batch * width)
    cache.assign({slot: pages[slot * width : (slot + 1) * width] for slot in range(batch)})
    return cache


DECODE_BATCHES = Suite(NAME, measure, "engine", rows, engine_knobs)
