"""Matrix product with a weight: x [T, K] times weight [N, K] transposed. One version a file or folder.

| version | idea |
|---|---|
| naive | one thread an output element, eight fp32 chains over K |
| streamed | the decode GEMM; bf16, fp16; weights once through a ring, tensor cores, K in order; to 128 tokens a pass |
| tiled | the prefill GEMM; many tokens: tiles by TMA and wgmma (sm_90a) or cp.async and mma.sync; streamed's bits |

What each gained: docs/decisions.md. Shares of the limit (weight bytes over bandwidth, or the matrix rate): "Every
kernel under the roofline" of the page, `reports/site/index.html` (`make report`).
"""

from __future__ import annotations

import torch

from kernels.linear.naive import linear

__all__ = ["linear", "reference"]


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in torch, in the dtype given."""
    return torch.nn.functional.linear(x, weight)
