"""AWQ: before weights are rounded, the inputs that matter most are made smaller, and their columns larger to match.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023. The factors are
folded into what produces the inputs: v for o, up for down, and in a model whose norms stand before a branch these for
qkv and for gate and up. Where norms stand behind a branch (OLMo-2) the stream itself is the input, which others read,
too: nothing can be folded there, and only the ranges of qkv, gate and up are searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.quant.block import ROLES
from engine.model.quant.calibration import Moments
from engine.model.quant.grid import Grid, codes_of, rounded
from engine.model.quant.int4 import Int4Matrix

STEPS = 20  # exponents from 0 up to 1 that are tried


def producers(config: ModelConfig) -> dict[str, str]:
    """By role, what a layer's factors are folded into: a matrix by its rows, or a norm."""
    found = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}
    if config.architecture.norm_placement == "pre":
        found |= {"qkv": config.architecture.attention_norm, "gate_up": config.architecture.mlp_norm}
    return found


def factors(weights: Sequence[Tensor], moments: Moments, grid: Grid, heads: tuple[int, int]) -> Tensor:
    """Factors for the columns of matrices [N, K] that read the same inputs, those of least error: fp32 [P].

    heads: (P / D, heads of D inputs that each of the producer's is copied to): K = P · copies.
    """
    sizes = _per_producer(moments.size, heads).clamp(min=1e-4)
    best, found = None, torch.ones_like(sizes)
    for step in range(STEPS):
        tried = sizes ** (step / STEPS)
        tried = tried / (tried.max() * tried.min()).sqrt()
        spread = per_column(tried, heads)
        error = 0.0
        for weight in weights:
            groups = grid.groups(weight * spread)
            off = rounded(groups, *grid.span(groups)).flatten(1) / spread - weight
            error += ((off @ moments.second) * off).sum().item()
        if best is None or error < best:
            best, found = error, tried
    return found


def _per_producer(sizes: Tensor, heads: tuple[int, int]) -> Tensor:
    kept, copies = heads
    return sizes.view(kept, copies, -1).mean(1).flatten()


def per_column(found: Tensor, heads: tuple[int, int]) -> Tensor:
    """Factors [P] for each of the K inputs that copy them."""
    kept, copies = heads
    return found.view(kept, 1, -1).expand(kept, copies, -1).flatten()


def fold(weights: dict[str, Tensor], config: ModelConfig, moments: dict[str, Moments], grid: Grid) -> dict[str, Tensor]:
    """Fold a layer's factors into its weights, in place.

    Returns:
        By role, the second moments [K, K] of the inputs as they are now.
    """
    seconds = {role: found.second for role, found in moments.items()}
    for role, producer in producers(config).items():
        kept = config.num_key_value_heads if role == "o" else 1
        heads = kept, config.num_attention_heads // kept if role == "o" else 1
        found = factors([weights[name] for name in ROLES[role]], moments[role], grid, heads)
        spread = per_column(found, heads)
        for name in ROLES[role]:
            weights[name] = weights[name] * spread
        made = weights[producer]
        weights[producer] = made / (found if made.ndim == 1 else found[:, None])
        seconds[role] = seconds[role] / (spread[:, None] * spread)
    return seconds


def searched(weight: Tensor, second: Tensor, grid: Grid) -> Int4Matrix:
    """`weight` fp32 [N, K] rounded to nearest within the ranges of least error for inputs of this second moment.

    What two groups' errors add up to is left out: each group has the range that is best for it alone.
    """
    groups = grid.groups(weight)
    count, size = groups.shape[1:]
    own = second.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, g, g]

    def error(off: Tensor) -> Tensor:
        by_group = off.transpose(0, 1)  # [G, N, g]
        return ((by_group @ own) * by_group).sum(-1).t()

    scales, zeros = grid.search(groups, error)
    return grid.matrix(codes_of(groups, scales, zeros).flatten(1), scales, zeros)
