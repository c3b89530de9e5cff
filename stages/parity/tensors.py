"""Weights: every tensor as the engine holds it, and as transformers loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.model.tensors import checkpoint_tensors
from stages.findings import mean_difference
from stages.hf import load_model
from stages.parity.check import Check
from stages.parity.context import Context

if TYPE_CHECKING:
    from torch import Tensor

    from engine.model.config import ModelConfig
    from engine.model.weights import Weights


def engine_tensors(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """Tensors that the engine multiplies with, under the names and in the shapes that transformers gives them."""
    named = {tensor.name: weights.read(tensor) for tensor in checkpoint_tensors(config)}
    return {"lm_head.weight": weights.lm_head.rows()} | named  # which a checkpoint does not hold where it is tied


def check_tensors(context: Context) -> None:
    """Every tensor as the engine holds it equals the one transformers loads."""
    import torch

    from engine.model.weights import load_weights

    device = "cuda" if context.gpu else "cpu"
    dtype = getattr(torch, context.config.dtype or "bfloat16")
    ours = engine_tensors(context.config, load_weights(context.path, context.config, device, dtype, context.ops))
    theirs = load_model(context.path, dtype, device).state_dict()
    names = sorted(ours.keys() | theirs.keys())
    for name in names:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            value = float("inf")
        else:
            value = mean_difference(ours[name], theirs[name])
        context.findings.check(
            suite="tensors", case=name, metric="mean_abs_difference", value=value, limit=0.0,
            limit_kind="the checkpoint's own numbers", dtype=context.config.dtype,
        )  # fmt: skip


TENSORS = Check("tensors", check_tensors, needs_engine=False)
