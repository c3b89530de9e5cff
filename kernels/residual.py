"""Residual addition: the sum of two tensors, rounded once.

| version | what it does |
|---|---|
| naive | one thread an element |

Measured shares of the limit: `reports/REPORT.md`.
"""

from __future__ import annotations

import torch

from kernels import check, device
from kernels.cuda import cuda, int64
from kernels.launch import Kernel, kernel_factory

THREADS = 128


def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y in torch; exact before its one rounding when given float64."""
    return x + y


@kernel_factory
def naive(dtype: str) -> Kernel:
    """x, y, out flat, their number of elements; grid (elements / THREADS,)."""
    load, store = device.load(dtype), device.store(dtype)

    def add(x, y, out, count):
        i = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if i < count:
            store(out, i, load(x, i) + load(y, i))

    return Kernel(f"residual_naive_{dtype}", add, (f"{dtype}*", f"{dtype}*", f"{dtype}*", "i64"), THREADS)


def add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = x + y in fp32, rounded once to the dtype.

    x, y, out [T, H] contiguous, bf16, fp16 or fp32; out may be x or y. Returns out.
    Raises TypeError or ValueError where shapes, dtypes or strides do not fit.
    """
    dtype = check.dtype_name("residual.add", "x", x)
    shape = tuple(x.shape)
    check.tensor("residual.add", "x", x, shape, x.dtype)
    check.tensor("residual.add", "y", y, shape, x.dtype)
    check.tensor("residual.add", "out", out, shape, x.dtype)
    count = x.numel()
    if count:
        naive(dtype).launch((-(-count // THREADS),), x, y, out, count)
    return out
