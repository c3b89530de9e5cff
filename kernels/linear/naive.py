"""Matrix product, version naive: one thread an output element.

Order of summation: the eight chains of `device.dot`, fp32. It depends on K alone: a row's bits are the same alone and
in any batch.
"""

from __future__ import annotations

import torch

from kernels import check, device
from kernels.cuda import cuda, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 64


@kernel_factory
def naive(dtype: str) -> Kernel:
    """x [T, K], weight [N, K], out [T, N], N, K; grid (T, N / THREADS): blocks of the same weight rows run together."""
    dot, store = device.dot(dtype, dtype), device.store(dtype)

    def linear(x, weight, out, columns, depth):
        token = int64(cuda.blockIdx.x)
        n = int64(cuda.blockIdx.y) * THREADS + cuda.threadIdx.x
        if n < columns:
            store(out, token * columns + n, dot(x, token * depth, weight, n * depth, depth))

    pointer = f"{dtype}*"
    return Kernel(f"linear_naive_{dtype}", linear, (pointer, pointer, pointer, "i32", "i32"), THREADS)


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = x @ weight.T, accumulated in fp32 and rounded once.

    x [T, K], weight [N, K], out [T, N], bf16, fp16 or fp32, contiguous. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("linear", "x", x)
    count, depth = check.dimensions("linear", "x", x, "T, K")
    columns, _ = check.dimensions("linear", "weight", weight, "N, K")
    check.tensor("linear", "x", x, (count, depth), x.dtype)
    check.tensor("linear", "weight", weight, (columns, depth), x.dtype)
    check.tensor("linear", "out", out, (count, columns), x.dtype)
    if count and columns:
        naive(dtype).launch((count, -(-columns // THREADS)), x, weight, out, columns, depth)
    return out
