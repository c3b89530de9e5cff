"""Each operation of a decode step by itself: how long its calls take, over all layers in a row."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.bench.decode_step import Found, make_suite, name_case
from stages.params import Workload

if TYPE_CHECKING:
    import torch

    from engine.model.cost import Ceilings
    from engine.model.kv_cache import ContiguousCache
    from engine.model.transformer import Model

CASES = ((1, 128), (32, 1024))  # batch, context
CAPTURED = 64  # calls of a kernel in one graph, at least
PARTS = (
    "embedding", "qkv", "attention", "o", "add_norm", "gate_up", "down", "norm", "head", "argmax", "advance",
)  # fmt: skip
UNITS: dict[str, tuple[str, str | None]] = {
    "call_us": ("µs", "lower"),
    "step_share": ("1", None),
    "bytes": ("B", None),
}
BY_READ = "read bandwidth over the bytes moved"


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
    from engine.ops.batch import Batch

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
    step = Batch(tokens, slots, positions, one_token_per_slot=True)
    norm = config.rms_norm_eps, config.architecture.norm_rounding
    layers = list(enumerate(weights.layers))
    norms = [weight for _, layer in layers for weight in (layer.attention_norm, layer.mlp_norm)]
    post = config.architecture.norm_placement == "post"

    def attend(index: int) -> Callable[[], Any]:
        return lambda: ops.attend(qkv, model.attention[index], cache.layer(index), step)

    def linears(kind: str, given: Any, run: Any = ops.linear) -> Part:
        matrices = [getattr(layer, kind) for _, layer in layers]
        out = matrices[0].out_features // (2 if kind == "gate_up" else 1)
        calls = [lambda matrix=matrix: run(given, matrix) for matrix in matrices]
        return Part(kind, calls, sum(m.nbytes + given.nbytes + batch * out * dtype.itemsize for m in matrices))

    cached = step_cost(model.footprint, [1] * batch, [context + 1] * batch).kv_bytes
    parts = [
        Part("embedding", [lambda: ops.embedding(tokens, weights.embedding)], 2 * x.nbytes),
        linears("qkv", x),
        Part("attention", [attend(index) for index, _ in layers], cached + len(layers) * (qkv.nbytes + q.nbytes)),
        linears("o", q),
        Part(
            "add_norm",
            [
                lambda weight=weight: ops.add_norm(x, y, weight, *norm, config.architecture.norm_placement)
                for weight in norms
            ],
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
    return samples, part.bytes / ceilings.bandwidth / calls * 1e6, BY_READ


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


KERNELS = make_suite(
    "kernels",
    UNITS,
    CASES,
    lambda size: [(f"{part}, {name_case(*size)}", metric) for part in PARTS for metric in UNITS],
    bench_kernels,
)
