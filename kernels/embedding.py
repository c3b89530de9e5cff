"""Embedding: a row of the table for each token.

| version | what it does |
|---|---|
| naive | one block a token, its threads copy the row side by side |

Measured shares of the copy bandwidth: `reports/REPORT.md`.
"""

from __future__ import annotations

import torch

from kernels import check
from kernels.cuda import cuda, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 128


def reference(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """table[tokens] in torch: [T] and [V, H] to [T, H]."""
    return table[tokens.long()]


@kernel_factory
def naive(dtype: str) -> Kernel:
    """tokens i32[T], table [V, H], out [T, H], H; grid (T,)."""

    def embedding(tokens, table, out, width):
        token = cuda.blockIdx.x
        source = int64(tokens[token]) * width
        target = int64(token) * width
        i = cuda.threadIdx.x
        while i < width:
            out[target + i] = table[source + i]
            i += THREADS

    return Kernel(f"embedding_naive_{dtype}", embedding, ("i32*", f"{dtype}*", f"{dtype}*", "i32"), THREADS)


def embedding(tokens: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[t] = table[tokens[t]]: tokens i32[T], 0 <= token < V (not checked), table [V, H] and out [T, H] of one dtype.

    bf16 or fp32, contiguous. Returns out. Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("embedding", "table", table)
    vocabulary, width = check.dimensions("embedding", "table", table, "V, H")
    (count,) = check.dimensions("embedding", "tokens", tokens, "T")
    check.tensor("embedding", "tokens", tokens, (count,), torch.int32)
    check.tensor("embedding", "table", table, (vocabulary, width), table.dtype)
    check.tensor("embedding", "out", out, (count, width), table.dtype)
    if count:
        naive(dtype).launch((count,), tokens, table, out, width)
    return out
