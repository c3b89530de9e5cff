"""Every layer's activations, the logits and each greedy choice: the run's model, then Llama and Mistral shapes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.findings import Findings, Piece, forward, load_engine, observe_engine
from stages.hf import exact_fp32, load_model, observe
from stages.parity.check import Check
from stages.parity.context import DTYPES, Context
from stages.parity.errors import HALVES, compare_layers
from stages.parity.greedy import MARGIN_KIND, Divergence, diverge
from stages.parity.shapes import SHAPE_TOKENS, SHAPES, make_checkpoint, random_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from engine.llm import EngineConfig
    from engine.model.transformer import Model as EngineModel

NORM_SHARE = 0.02


def compare_norm(findings: Findings, engine: EngineModel, theirs: Sequence[dict[str, Tensor]], **knobs: Any) -> None:
    """The engine's final norm of transformers' own input in its dtype, 16 bits wide, gives transformers' output.

    Where a norm rounds hides below the ratio of a whole layer's errors, but changes a third of its outputs' last bits;
    another order of summation changes hardly any.
    """
    last = f"layers.{engine.config.num_hidden_layers - 1}"
    differing, count = 0, 0
    for tensors in theirs:
        weight = engine.weights.norm
        x = tensors[last].to(weight.device, weight.dtype)
        out = engine.ops.rms_norm(x, weight, engine.config.rms_norm_eps, engine.config.architecture.norm_rounding)
        differing += int((out.float() != tensors["norm"].float().to(weight.device)).sum())
        count += out.numel()
    findings.check(
        suite="layers", case="norm of transformers' input", metric="differing_share", value=differing / count,
        limit=NORM_SHARE, limit_kind="ties that another order of summation turns", **knobs,
    )  # fmt: skip


def check_greedy(context: Context, engine: EngineModel, dtype: str) -> None:
    """The engine's own choice at each step of transformers' greedy continuation, which is forced on it."""
    found: list[Divergence] = []
    for index, prompt in enumerate(context.bundle.prompts):
        reference = prompt.greedy[dtype]
        ids = prompt.token_ids + reference.token_ids[:-1]
        logits = forward(engine, [Piece(0, ids)], engine.new_cache(1, len(ids)))[0][len(prompt.token_ids) - 1 :]
        for step, chosen in enumerate(engine.ops.argmax(logits).tolist()):
            if chosen != reference.token_ids[step]:
                found.append(diverge(reference, index, step, chosen, dtype))
    shared: dict[str, Any] = {"suite": "layers", "case": "greedy", "dtype": dtype, "backend": context.backend}
    counts = {
        "divergent_tokens": len(found),
        "divergences_beyond_one_step": sum(one.margin > one.rounding for one in found),
    }
    for metric, count in counts.items():
        context.findings.rows.add(metric=metric, value=count, unit="1", better="lower", **shared)
    unexplained = [one for one in found if one.margin > one.allowed]
    context.findings.check(
        metric="unexplained_divergences", value=len(unexplained), limit=0.0,
        limit_kind="a token may differ only within " + MARGIN_KIND[dtype],
        note=unexplained[0].note if unexplained else None, **shared,
    )  # fmt: skip
    if found:
        context.findings.rows.add(
            metric="first_divergence_margin", value=found[0].margin, unit="logit", better="lower",
            limit=found[0].allowed, limit_kind=MARGIN_KIND[dtype], note=found[0].note, **shared,
        )  # fmt: skip


def check_layers(context: Context) -> None:
    """Every layer and the logits: the model of the run, then Llama and Mistral shapes."""
    observed = [index for index, prompt in enumerate(context.bundle.prompts) if prompt.observed]
    for dtype in DTYPES:
        engine = context.llm(dtype).model
        ours = [observe_engine(engine, context.bundle.prompts[index].token_ids) for index in observed]
        exact, theirs = (
            [context.bundle.activations(kind, index, context.device) for index in observed] for kind in DTYPES
        )
        compare_layers(context.findings, "layers", dtype, ours, exact, theirs, backend=context.backend)
        if dtype == "bfloat16":
            compare_norm(context.findings, engine, theirs, dtype=dtype, backend=context.backend)
        check_greedy(context, engine, dtype)
        # Or the next dtype's weights would not find this one's memory free.
        del engine, ours, exact, theirs
    for name, architecture in SHAPES.items():
        compare_shape(context.findings, name, architecture, context.engine)


def compare_shape(
    findings: Findings, name: str, architecture: dict[str, Any], engine: Callable[[str], EngineConfig]
) -> None:
    """A small model of random weights, saved by transformers: `engine(dtype)` against transformers, in each dtype."""
    import torch

    device, backend = engine("float32").device, engine("float32").backend

    prompts = random_prompts(SHAPE_TOKENS, architecture["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_checkpoint(architecture, path)
        reference = {}
        for dtype in ("float32", *HALVES):
            loaded = load_model(path, getattr(torch, dtype), device, attention="eager")
            with exact_fp32():
                reference[dtype] = [observe(loaded, ids) for ids in prompts]
        for dtype in reference:
            loaded = load_engine(path, engine(dtype))
            ours = [observe_engine(loaded, ids) for ids in prompts]
            sides = ours, reference["float32"], reference[dtype]
            compare_layers(findings, "layers", dtype, *sides, backend=backend, model=name)
            if dtype in HALVES:
                compare_norm(findings, loaded, reference[dtype], dtype=dtype, backend=backend, model=name)


LAYERS = Check("layers", check_layers)
