"""Causal attention over the KV cache. One version a file or folder.

| version | idea |
|---|---|
| naive | one block a head of a token, chunks of 64 positions combined in order |
| flash | flash decode; bf16, fp16; tensor cores, online softmax, split-KV, GQA; fused with norm, RoPE and KV write |
| prefill | flash attention of many tokens at a time, with flash's bits; mma.sync, or wgmma and TMA (sm_90a) |

What each gained: docs/decisions.md. Shares of the limit (KV bytes over bandwidth, or the matrix rate): "Every
kernel under the roofline" of the page, `reports/site/index.html` (`make report`).
"""

from __future__ import annotations

import torch

from kernels.attention.naive import attention

__all__ = ["attention", "reference"]


def reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """The same in torch, token by token, in the dtype given. Shapes as `attention`; returns [T, Hq, D]."""
    group = q.shape[1] // k_cache.shape[2]
    rows = []
    for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        begin = max(0, position - window + 1) if window else 0
        k = k_cache[slot, begin : position + 1].repeat_interleave(group, dim=1)
        v = v_cache[slot, begin : position + 1].repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,jhd->hj", q[t], k) * scale
        rows.append(torch.einsum("hj,jhd->hd", torch.softmax(scores, dim=-1), v))
    return torch.stack(rows) if rows else q.new_empty(q.shape)
