"""Weights: every tensor as the engine holds it, and as transformers loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.findings import mean_difference
from stages.hf import load_model
from stages.parity.check import Check
from stages.parity.context import Context

if TYPE_CHECKING:
    from torch import Tensor

    from engine.model.config import ModelConfig


def engine_tensors(config: ModelConfig, weights: Any) -> dict[str, Tensor]:
    """The engine's fused tensors under the names and in the shapes that transformers gives them (views, no copies)."""
    named = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    named["lm_head.weight"] = weights.lm_head
    first, second = config.layer_norm_names()
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split([config.q_size, config.kv_size, config.kv_size])
        gate, up = layer.gate_up.split(config.intermediate_size)
        parts = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.o,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
            "self_attn.q_norm": layer.q_norm, "self_attn.k_norm": layer.k_norm,
            first: layer.attention_norm, second: layer.mlp_norm,
        }  # fmt: skip
        named |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items() if part is not None}
    return named


def check_tensors(context: Context) -> None:
    """Every tensor as the engine holds it equals the one transformers loads."""
    import torch

    from engine.model.weights import load_weights

    device = "cuda" if context.gpu else "cpu"
    dtype = getattr(torch, context.config.dtype or "bfloat16")
    ours = engine_tensors(context.config, load_weights(context.path, context.config, device, dtype))
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
