"""References in torch and plain Python: the filters of a row, and the random words of a draw."""

from __future__ import annotations

import math

import torch


def reference_filter(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """One row of logits [V], not NaN, less the largest and divided by temperature, what the filters drop at -inf:
    transformers' order and rules. The largest are at 0, infinite ones too."""
    x = logits.double()
    x = torch.where(x == x.max(), 0.0, (x - x.max()) / temperature)
    if 0 < top_k < len(x):
        x = x.masked_fill(x < torch.topk(x, top_k).values[-1], -math.inf)
    if top_p < 1.0:
        ascending, order = torch.sort(x)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[-1] = False
        x = x.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), -math.inf)
    if min_p > 0.0:
        probabilities = x.softmax(-1)
        x = x.masked_fill(probabilities < min_p * probabilities.max(), -math.inf)
    return x


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in plain Python: four 32-bit words. Source: Salmon et al., SC 2011, "Parallel random numbers"."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0], c[1], c[2], c[3]
