"""The decode step in a week's engine: how long it takes, what its kernels take, what a CUDA graph of it costs.

All of it on a cache of random numbers, with one token a sequence and step, chosen greedily. What a step moves at least,
its weights and its keys and values, over the copy bandwidth of that machine is its limit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.metrics import Rows
from stages.params import Workload

if TYPE_CHECKING:
    import torch

    from engine.model.cost import Ceilings
    from engine.model.kv_cache import ContiguousCache
    from engine.model.transformer import Model

STEP, KERNELS, GRAPHS = "decode_step", "kernels", "graphs"
SUITES = (STEP, KERNELS, GRAPHS)
BATCHES, CONTEXTS = (1, 8, 32, 128), (128, 1024)
KERNEL_CASES = ((1, 128), (32, 1024))
GRAPH_CASES = ((1, 128), (8, 128), (32, 128))
CAPTURED = 64  # calls of a kernel in one graph, at least
PARTS = (
    "embedding", "qkv", "attention", "o", "add_norm", "gate_up", "down", "norm", "head", "argmax", "advance",
)  # fmt: skip
# suite -> metric -> unit, better
METRICS: dict[str, dict[str, tuple[str, str | None]]] = {
    STEP: {"step_ms": ("ms", "lower"), "output_throughput": ("tokens/s", "higher")},
    KERNELS: {"call_us": ("µs", "lower"), "step_share": ("1", None), "bytes": ("B", None)},
    GRAPHS: {"step_ms": ("ms", "lower"), "host_us_per_token": ("µs", "lower"), "capture_ms": ("ms", "lower")},
}
BY_COPY = "copy bandwidth over the bytes moved"


def list_rows(suite: str) -> list[tuple[str, str, int, int]]:
    """(case, metric, batch, context) of a suite's rows."""
    if suite == STEP:
        sizes = [(batch, context) for context in CONTEXTS for batch in BATCHES]
        return [(name_case(*size), metric, *size) for size in sizes for metric in METRICS[STEP]]
    if suite == KERNELS:
        return [
            (f"{part}, {name_case(*size)}", metric, *size)
            for size in KERNEL_CASES
            for part in PARTS
            for metric in METRICS[KERNELS]
        ]
    return [
        (f"{how}, {name_case(*size)}", metric, *size)
        for size in GRAPH_CASES
        for how, metric in (
            ("without a graph", "step_ms"), ("graph", "step_ms"), ("graph of many steps", "step_ms"),
            ("graph", "host_us_per_token"), ("graph of many steps", "host_us_per_token"), ("graph", "capture_ms"),
        )
    ]  # fmt: skip


def name_case(batch: int, context: int) -> str:
    return f"batch {batch} context {context}"


def add_missing(rows: Rows, suite: str, reason: str, sizes: Sequence[tuple[int, int]] | None = None, **knobs: Any):
    """The suite's rows without values, saying why; of `sizes` (batch, context) alone where given."""
    for case, metric, batch, context in list_rows(suite):
        if sizes is None or (batch, context) in sizes:
            unit, better = METRICS[suite][metric]
            rows.missing(
                suite=suite, case=case, metric=metric, unit=unit, better=better, reason=reason,
                batch=batch, context=context, **knobs,
            )  # fmt: skip


def bench(
    suite: str, rows: Rows, model: Model, workload: Workload, ceilings: Ceilings, graph: bool, **knobs: Any
) -> None:  # fmt: skip
    """The suite's rows on a GPU. A case that the model or the memory does not hold is a row that says so."""
    from engine.bench.latency import TooLarge

    run = {STEP: bench_step, KERNELS: bench_kernels, GRAPHS: bench_graphs}[suite]
    for size in dict.fromkeys((batch, context) for _, _, batch, context in list_rows(suite)):
        try:
            found = run(model, workload, ceilings, graph, *size)
        except TooLarge as reason:
            add_missing(rows, suite, str(reason), [size], **knobs)
            continue
        for case, metric, samples, limit, kind in found:
            unit, better = METRICS[suite][metric]
            rows.add(
                suite=suite, case=case, metric=metric, value=None, samples=samples, unit=unit, better=better,
                limit=limit, limit_kind=kind, batch=size[0], context=size[1], **knobs,
            )  # fmt: skip


Found = list[tuple[str, str, list[float], float | None, str | None]]  # case, metric, samples, limit, kind of limit


def bench_step(model: Model, workload: Workload, ceilings: Ceilings, graph: bool, batch: int, context: int) -> Found:
    """Decode steps as the engine runs them, each token read by the host, the next step enqueued before."""
    from engine.bench.latency import Case, measure

    case = Case(prompt=0, new=workload.new_tokens, depth=context)
    result = measure(model, case, batch, workload.repeats, graph, chunk=1, ceilings=ceilings)
    limit = None if result.limit is None else result.limit * 1e3
    name = name_case(batch, context)
    steps = [sample / result.steps * 1e3 for sample in result.samples]
    best = None if limit is None else batch / limit * 1e3
    return [
        (name, "step_ms", steps, limit, result.limit_kind),
        (name, "output_throughput", result.rates, best, result.limit_kind),
    ]


# --- one kernel at a time ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """All calls of one operation in a decode step, and the bytes that they move together."""

    name: str
    calls: list[Callable[[], Any]]
    bytes: int


def list_parts(model: Model, cache: ContiguousCache, batch: int, context: int) -> list[Part]:
    """A decode step's operations on random inputs: each layer's call on that layer's weights and cache."""
    import torch

    from engine.model.cost import step_cost

    config, weights, ops = model.config, model.weights, model.ops
    dtype, device = weights.dtype, weights.device
    generator = torch.Generator(device).manual_seed(0)

    def random(width: int) -> Any:
        return torch.randn(batch, width, generator=generator, device=device).to(dtype)

    def integers(values: Any) -> Any:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    hidden, inner = config.hidden_size, config.intermediate_size
    x, y, q, mlp = random(hidden), random(hidden), random(config.q_size), random(inner)
    qkv, logits = random(config.q_size + 2 * config.kv_size), random(config.vocab_size)
    tokens, slots = integers(range(batch)), integers(range(batch))
    positions = integers([context] * batch)
    chosen, places, columns = (torch.zeros_like(tokens) for _ in range(3))
    history = integers([[0] * (cache.capacity + 1)] * batch)
    norm = config.rms_norm_eps, config.norm_rounding
    layers = list(enumerate(weights.layers))
    norms = [weight for _, layer in layers for weight in (layer.attention_norm, layer.mlp_norm)]
    post = config.norm_placement == "post"

    def attend(index: int, layer: Any) -> Callable[[], Any]:
        return lambda: ops.attend(
            qkv, layer.q_norm, layer.k_norm, *norm, *model.tables[index], cache.k[index], cache.v[index], slots,
            positions, model.scale, config.window(index), True,
        )  # fmt: skip

    def linears(kind: str, given: Any, run: Any = ops.linear) -> Part:
        matrices = [getattr(layer, kind) for _, layer in layers]
        out = matrices[0].shape[0] // (2 if kind == "gate_up" else 1)
        calls = [lambda weight=weight: run(given, weight) for weight in matrices]
        return Part(kind, calls, sum(m.nbytes + given.nbytes + batch * out * dtype.itemsize for m in matrices))

    cached = step_cost(config, dtype, [1] * batch, [context + 1] * batch).kv_bytes
    parts = [
        Part("embedding", [lambda: ops.embedding(tokens, weights.embedding)], 2 * x.nbytes),
        linears("qkv", x),
        Part("attention", [attend(*pair) for pair in layers], cached + len(layers) * (qkv.nbytes + q.nbytes)),
        linears("o", q),
        Part(
            "add_norm",
            [lambda weight=weight: ops.add_norm(x, y, weight, *norm, config.norm_placement) for weight in norms],
            len(norms) * (3 if post else 4) * x.nbytes,
        ),
        linears("gate_up", x, ops.linear_swiglu),
        linears("down", mlp),
        Part("norm", [lambda: ops.rms_norm(x, weights.norm, *norm)], 2 * x.nbytes),
        Part("head", [lambda: ops.linear(x, weights.lm_head)], weights.lm_head.nbytes + x.nbytes + logits.nbytes),
        Part("argmax", [lambda: ops.argmax(logits, out=chosen)], logits.nbytes),
        Part("advance", [lambda: ops.advance(chosen, tokens, places, columns, history)], 8 * tokens.nbytes),
    ]
    # Before a block, the last norm is part of the last addition.
    return [part for part in parts if post or part.name != "norm"]


def time_part(part: Part, repeats: int, device: torch.device) -> list[float]:
    """Milliseconds that the part's calls take, one after another; on a GPU enough of them in one CUDA graph."""
    from engine.runtime.cuda_graph import capture
    from stages.timing import measure

    rounds = -(-CAPTURED // len(part.calls))

    def run() -> None:
        for _ in range(rounds):
            for call in part.calls:
                call()

    for call in part.calls:
        call()
    if device.type == "cuda":
        run = capture(run, None)[0].replay
    return [sample / rounds for sample in measure(run, 2, repeats, device)]


def time_calls(
    part: Part, repeats: int, ceilings: Ceilings, device: torch.device
) -> tuple[list[float], float | None, str | None]:
    """Microseconds of one of the part's calls, the least it could take and why."""
    calls = len(part.calls)
    samples = [sample / calls * 1e3 for sample in time_part(part, repeats, device)]
    if ceilings.bandwidth is None:
        return samples, None, None
    return samples, part.bytes / ceilings.bandwidth / calls * 1e6, BY_COPY


def bench_kernels(model: Model, workload: Workload, ceilings: Ceilings, graph: bool, batch: int, context: int) -> Found:
    """Each operation of the step by itself, over all layers in a row, so that no weight is still in the L2 cache."""
    import torch

    from engine.bench.latency import random_cache

    found: Found = []
    with torch.inference_mode():
        parts = list_parts(model, random_cache(model, batch, context + 1), batch, context)
        timed = [(part, *time_calls(part, workload.repeats, ceilings, model.weights.device)) for part in parts]
    spent = {part.name: statistics.median(samples) * len(part.calls) for part, samples, _, _ in timed}
    for part, samples, limit, kind in timed:
        case = f"{part.name}, {name_case(batch, context)}"
        found += [
            (case, "call_us", samples, limit, kind),
            (case, "step_share", [spent[part.name] / sum(spent.values())], None, None),
            (case, "bytes", [float(part.bytes)], None, None),
        ]
    return found


# --- graphs -----------------------------------------------------------------------------------------------------------


def bench_graphs(model: Model, workload: Workload, ceilings: Ceilings, graph: bool, batch: int, context: int) -> Found:
    """What capturing a step costs, what replaying it does, and the host's time a token.

    Host time of single steps: enqueueing one and taking over its tokens once they are there. Of many: enqueueing them
    all, over their tokens.
    """
    from engine.bench.latency import Case, case_cost, measure_decode, random_cache, seconds, start_decode
    from engine.runtime.decode_loop import DecodeLoop

    steps, repeats, device = workload.new_tokens, workload.repeats, model.weights.device
    size = name_case(batch, context)
    cost, _ = case_cost(model.config, model.weights.dtype, Case(0, steps, context), batch)
    limit, kind = ceilings.milliseconds(cost)
    eager, replayed = (
        [sample / steps * 1e3 for sample in measure_decode(model, batch, steps, context, repeats, captured)]
        for captured in (False, True)
    )
    loop = DecodeLoop(model, random_cache(model, batch, context + steps), graph=True)
    start_decode(loop, batch, context)
    captures = [seconds(loop.capture, device) * 1e3 for _ in range(repeats)]
    many, host_many, host_single = [], [], []
    for repeat in range(repeats + 1):
        start_decode(loop, batch, context)
        spent: list[float] = []
        whole = seconds(lambda spent=spent: spent.append(clocked(lambda: loop.advance(steps))), device)
        start_decode(loop, batch, context)
        single = 0.0
        for _ in range(steps):
            single += clocked(loop.enqueue)
            seconds(lambda: None, device)
            single += clocked(loop.wait)
        if repeat:  # the first captures
            many.append(whole / steps * 1e3)
            host_many.append(spent[0] / (steps * batch) * 1e6)
            host_single.append(single / (steps * batch) * 1e6)
    return [
        (f"without a graph, {size}", "step_ms", eager, limit, kind),
        (f"graph, {size}", "step_ms", replayed, limit, kind),
        (f"graph of many steps, {size}", "step_ms", many, limit, kind),
        (f"graph, {size}", "host_us_per_token", host_single, None, None),
        (f"graph of many steps, {size}", "host_us_per_token", host_many, None, None),
        (f"graph, {size}", "capture_ms", captures, None, None),
    ]


def clocked(run: Callable[[], Any]) -> float:
    """Seconds of the host in `run`, whatever it has enqueued."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
