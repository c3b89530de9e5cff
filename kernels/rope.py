"""Rotary position embedding, in place: the half rotation that Llama and OLMo use.

    x[:D/2], x[D/2:]  become  x[:D/2] * cos - x[D/2:] * sin,  x[D/2:] * cos + x[:D/2] * sin

| version | what it does |
|---|---|
| naive | one block a head of a token, one thread a pair of elements |

Measured shares of the limit: `reports/REPORT.md`.

Arithmetic, for every version: both products and their sum are rounded to fp32 one by one (no fused multiply-add), as
torch does, and the result once to the dtype; the bits are torch's.
"""

from __future__ import annotations

import torch

from kernels import check, device, ptx
from kernels.cuda import cuda, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 64


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] rotated, in the dtype of cos and then in x's: cos, sin [P, D/2], positions [T]."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    c, s = cos[positions.long()].unsqueeze(1), sin[positions.long()].unsqueeze(1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


@kernel_factory
def naive(dtype: str) -> Kernel:
    """q, k, cos, sin, positions, q heads, D/2, token strides of q and k; grid (T, q heads + k heads)."""
    load, store = device.load(dtype), device.store(dtype)

    def rope(q, k, cos, sin, positions, q_heads, half, q_stride, k_stride):
        token = int64(cuda.blockIdx.x)
        head = int64(cuda.blockIdx.y)
        angle = int64(positions[token]) * half
        x = q
        start = token * q_stride + head * 2 * half
        if head >= q_heads:
            x = k
            start = token * k_stride + (head - q_heads) * 2 * half
        i = cuda.threadIdx.x
        while i < half:
            c, s = cos[angle + i], sin[angle + i]
            first, second = load(x, start + i), load(x, start + half + i)
            store(x, start + i, ptx.add_rn_f32(ptx.mul_rn_f32(first, c), -ptx.mul_rn_f32(second, s)))
            store(x, start + half + i, ptx.add_rn_f32(ptx.mul_rn_f32(second, c), ptx.mul_rn_f32(first, s)))
            i += THREADS

    kinds = (f"{dtype}*", f"{dtype}*", "f32*", "f32*", "i32*", "i32", "i32", "i64", "i64")
    return Kernel(f"rope_naive_{dtype}", rope, kinds, THREADS)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotate q [T, Hq, D] and k [T, Hk, D] in place by the angles of their tokens' positions.

    q, k bf16, fp16 or fp32, heads contiguous, any token stride (views of a fused projection); cos, sin fp32 [P, D/2];
    positions i32[T], 0 <= position < P (not checked). Arithmetic in fp32, rounded once.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("rope", "q", q)
    count, q_heads, width = check.dimensions("rope", "q", q, "T, Hq, D")
    _, k_heads, _ = check.dimensions("rope", "k", k, "T, Hk, D")
    if width % 2:
        raise ValueError(f"rope: q has head dimension {width}: an even number needed")
    limit, _ = check.dimensions("rope", "cos", cos, "P, D/2")
    q_stride = check.rows("rope", "q", q, (count, q_heads, width), q.dtype)
    k_stride = check.rows("rope", "k", k, (count, k_heads, width), q.dtype)
    check.tensor("rope", "cos", cos, (limit, width // 2), torch.float32)
    check.tensor("rope", "sin", sin, (limit, width // 2), torch.float32)
    check.tensor("rope", "positions", positions, (count,), torch.int32)
    if count:
        grid = (count, q_heads + k_heads)
        naive(dtype).launch(grid, q, k, cos, sin, positions, q_heads, width // 2, q_stride, k_stride)
